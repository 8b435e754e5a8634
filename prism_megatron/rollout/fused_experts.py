"""Fused experts on their way to engines, which hold them as trainers do: neither turns them.

    Hugging Face (transformers 4.57)                  on the way, and in the engine
    experts.gate_up_proj [experts, hidden, 2 * ffn]   experts.w13_weight [experts, 2 * ffn, hidden]
    experts.down_proj    [experts, ffn, hidden]       experts.w2_weight  [experts, hidden, ffn]

The name says which of the two a tensor is, as its shape may fit both. Engines import this: torch
alone.
"""

import torch
from torch import Tensor

_SENT = {
    ".experts.gate_up_proj": ".experts.w13_weight",
    ".experts.down_proj": ".experts.w2_weight",
}


def sent_name(name: str) -> str:
    """The name that a tensor with this Hugging Face name is sent under."""
    for stored, sent in _SENT.items():
        if name.endswith(stored):
            return name.removesuffix(stored) + sent
    return name


def hf_name(name: str) -> str:
    """The Hugging Face name of what is sent under this name."""
    for stored, sent in _SENT.items():
        if name.endswith(sent):
            return name.removesuffix(sent) + stored
    return name


def as_stored(name: str, tensor: Tensor) -> tuple[str, Tensor]:
    """Name and view of what was sent as Hugging Face's checkpoints have it, for an engine's own
    loader, which turns fused experts back."""
    stored = hf_name(name)
    return (name, tensor) if stored == name else (stored, tensor.transpose(1, 2))


@torch.no_grad()
def load_share(
    parameter: Tensor, name: str, whole: Tensor, ep: tuple[int, int], tp: tuple[int, int]
) -> bool:
    """Copy into an engine rank's parameter its experts, and of these its part of ffn, all at once.

    parameter: [own experts, 2 * own ffn, hidden] or [own experts, hidden, own ffn]; whole: what was
    sent under `name`; ep, tp: rank and size. False, and nothing is copied, if the shapes differ.
    """
    (ep_rank, ep_size), (tp_rank, tp_size) = ep, tp
    part = whole.unflatten(0, (ep_size, -1))[ep_rank]
    if name.endswith(".w13_weight"):
        # ranks have a part of gate and one of up
        part, parameter = part.unflatten(1, (2, -1)), parameter.unflatten(1, (2, -1))
    part = part.unflatten(2, (tp_size, -1))[:, :, tp_rank]
    if part.shape != parameter.shape:
        return False
    parameter.copy_(part)
    return True
