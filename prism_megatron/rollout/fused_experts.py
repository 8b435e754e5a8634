"""Fused experts on their way to engines, which hold them as trainers do: neither turns them.

    Hugging Face (transformers 4.57)                  on the way, and in the engine
    experts.gate_up_proj [experts, hidden, 2 * ffn]   experts.w13_weight [experts, 2 * ffn, hidden]
    experts.down_proj    [experts, ffn, hidden]       experts.w2_weight  [experts, hidden, ffn]

The name says which of the two a tensor is, as its shape may fit both, and in NAME[first:end] which
experts it has, if not all. Engines import this: torch alone.
"""

import re
from collections.abc import Iterator

import torch
from torch import Tensor

_SENT = {
    ".experts.gate_up_proj": ".experts.w13_weight",
    ".experts.down_proj": ".experts.w2_weight",
}
_PART = re.compile(r"(.*)\[(\d+):(\d+)\]")


def sent_name(name: str) -> str:
    """The name that a tensor with this Hugging Face name, or a part of it, is sent under."""
    for stored, sent in _SENT.items():
        if _whole(name).endswith(stored):
            return sent.join(name.rsplit(stored, 1))
    return name


def hf_name(name: str) -> str:
    """The Hugging Face name of what is sent under this name, or of what it is a part of."""
    name = _whole(name)
    for stored, sent in _SENT.items():
        if name.endswith(sent):
            return name.removesuffix(sent) + stored
    return name


def as_stored(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Names and views of what was sent, for an engine's own loader: all experts as Hugging Face's
    checkpoints have them, which it turns back, and some as checkpoints that have them one by
    one."""
    stored = hf_name(name)
    if stored == name:
        yield name, tensor
    elif not (part := _PART.fullmatch(name)):
        yield stored, tensor.transpose(1, 2)
    else:
        layer, _, projection = stored.rpartition(".")
        for expert, matrix in enumerate(tensor, int(part[2])):
            if projection == "down_proj":
                yield f"{layer}.{expert}.down_proj.weight", matrix
            else:
                gate, up = matrix.chunk(2)
                yield f"{layer}.{expert}.gate_proj.weight", gate
                yield f"{layer}.{expert}.up_proj.weight", up


def _whole(name: str) -> str:
    part = _PART.fullmatch(name)
    return part[1] if part else name


@torch.no_grad()
def load_share(
    parameter: Tensor, name: str, sent: Tensor, ep: tuple[int, int], tp: tuple[int, int]
) -> bool:
    """Copy into an engine rank's parameter those of its experts that were sent, and of these its
    part of ffn, all at once.

    parameter: [own experts, 2 * own ffn, hidden] or [own experts, hidden, own ffn]; sent: what came
    under `name`; ep, tp: rank and size. False, and nothing is copied, if the shapes differ.
    """
    (ep_rank, ep_size), (tp_rank, tp_size) = ep, tp
    part = _PART.fullmatch(name)
    first, end = (int(part[2]), int(part[3])) if part else (0, ep_size * len(parameter))
    if end - first != len(sent) or end > ep_size * len(parameter):
        return False
    if _whole(name).endswith(".w13_weight"):
        # ranks have a part of gate and one of up
        sent, parameter = sent.unflatten(1, (2, -1)), parameter.unflatten(1, (2, -1))
    sent = sent.unflatten(2, (tp_size, -1))[:, :, tp_rank]
    if sent.shape[1:] != parameter.shape[1:]:
        return False
    # of all experts, those that are sent and this rank's
    before = ep_rank * len(parameter)
    low, high = max(first, before), min(end, before + len(parameter))
    if low < high:
        parameter[low - before : high - before].copy_(sent[low - first : high - first])
    return True
