"""Whether a weight sync reaches every tensor of an engine: keep, scramble, sync, compare.

Runs in the engine's process. SGLang has the same by itself (its /weights_checker).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

import torch
from torch import Tensor

Action = Literal["snapshot", "reset_tensors", "compare"]


class WeightCheck:
    """The check of one model; `tensors` gives its parameters by name whenever asked."""

    def __init__(self, tensors: Callable[[], Iterable[tuple[str, Tensor]]]) -> None:
        self._tensors = tensors
        self._kept: dict[str, Tensor] = {}

    @torch.no_grad()
    def run(self, action: Action) -> None:
        """snapshot: keep all tensors; reset_tensors: fill them with random numbers; compare:
        RuntimeError naming those that are not as they were kept."""
        if action == "snapshot":
            self._kept = {name: tensor.detach().cpu().clone() for name, tensor in self._tensors()}
        elif action == "reset_tensors":
            for _, tensor in self._tensors():
                tensor.copy_(torch.rand(tensor.shape))
        else:
            found = {name: tensor.detach().cpu() for name, tensor in self._tensors()}
            wrong = sorted(
                name
                for name in found.keys() | self._kept.keys()
                if name not in found
                or name not in self._kept
                or not _same_bits(found[name], self._kept[name])
            )
            if wrong:
                raise RuntimeError(
                    f"{len(wrong)} of {len(self._kept)} tensors differ: {', '.join(wrong[:8])}"
                )


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Also of FP8, which torch does not compare."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(*(t.contiguous().flatten().view(torch.uint8) for t in (a, b)))
