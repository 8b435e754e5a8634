"""What lets megatron.core 0.19 train on a machine without a GPU.

megatron.core names the current CUDA device in a few places where any device would do. Each entry
of PATCHES redirects one such name; nothing else of megatron.core changes. A test removes every
entry in turn and sees training fail, so the list holds no dead entry.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.tensor_parallel import random as megatron_random

_CPU = torch.device("cpu")


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The torch factory with device="cuda" read as the CPU."""

    def wrapped(*args: Any, **kwargs: Any) -> torch.Tensor:
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs["device"] = _CPU
        return factory(*args, **kwargs)

    return wrapped


_tensor_type = torch.Tensor.type


def _cuda_type_name(self: torch.Tensor, dtype: Any = None, **kwargs: Any) -> Any:
    """The distributed optimizer compares `param.type()` with torch.cuda type names
    (optimizer/distrib_optimizer.py), and a CPU parameter has to pass for one."""
    if dtype is not None:
        return _tensor_type(self, dtype, **kwargs)
    return _tensor_type(self).replace("torch.", "torch.cuda.", 1)


def _set_rng_state(new_state: torch.Tensor, *args: object, **kwargs: object) -> None:
    torch.set_rng_state(new_state)


def _get_rng_state(*args: object, **kwargs: object) -> torch.Tensor:
    return torch.get_rng_state()


PATCHES: dict[str, tuple[Any, str, Any]] = {
    # tensor_parallel/layers.py, p2p_communication.py, param_and_grad_buffer.py allocate on it
    "current_device": (torch.cuda, "current_device", lambda: _CPU),
    # optimizer and schedules wait for the device
    "synchronize": (torch.cuda, "synchronize", lambda *args, **kwargs: None),
    # pipeline_parallel/utils.py remembers it and, with a single one, never uses it
    "current_stream": (torch.cuda, "current_stream", lambda: None),
    # optimizer/clip_grads.py and schedules.py write device="cuda"
    "tensor": (torch, "tensor", _on_cpu(torch.tensor)),
    "zeros": (torch, "zeros", _on_cpu(torch.zeros)),
    "Tensor.type": (torch.Tensor, "type", _cuda_type_name),
    # the model-parallel random state lives in the CPU generator
    "get_rng_state": (torch.cuda, "get_rng_state", _get_rng_state),
    "manual_seed": (torch.cuda, "manual_seed", torch.manual_seed),
    "_get_cuda_rng_state": (megatron_random, "_get_cuda_rng_state", _get_rng_state),
    "_set_cuda_rng_state": (megatron_random, "_set_cuda_rng_state", _set_rng_state),
}


def apply(without: tuple[str, ...] = ()) -> None:
    """Install the patches in this process; `without` leaves entries out, for the test of each."""
    # `with torch.device(...)` looks up torch's factories once and by identity. It has to find the
    # real ones, or transformers takes a model built on "meta" for a finished one and leaves its
    # rotary frequencies uninitialised.
    with torch.device("meta"):
        torch.empty(0)
    for name, (owner, attribute, replacement) in PATCHES.items():
        if name not in without:
            setattr(owner, attribute, replacement)
