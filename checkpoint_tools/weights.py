"""Stored weights of either format, and the comparison of two: names, shapes, types and bits."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from rich.progress import track
from torch import Tensor

from checkpoint_tools.world import rank_and_size
from model_providers.weight_map import Weights

EXPERTS = (".experts.gate_up_proj", ".experts.down_proj")
"""How the names of fused expert tensors end."""


class StoredWeights(Weights):
    """Weights that lie in files."""

    @abstractmethod
    def file_of(self, name: str) -> Path:
        """Where the tensor comes from, for messages."""


Kind = Literal["missing", "surplus", "shape", "dtype", "value", "logits"]


@dataclass(frozen=True)
class Difference:
    """What is wrong with one tensor."""

    name: str
    kind: Kind
    detail: str


@dataclass
class Comparison:
    """What was compared and what differs."""

    tensors: int = 0
    bytes: int = 0
    differences: list[Difference] = field(default_factory=list)

    def raise_if_different(self, first: str, second: str) -> None:
        """ValueError naming the first few differences."""
        if self.differences:
            shown = "; ".join(f"{d.name}: {d.detail}" for d in self.differences[:5])
            raise ValueError(
                f"{second} differs from {first} in {len(self.differences)} tensors: {shown}"
            )


def compare(first: Weights, second: Weights, ignored: Iterable[str] = ()) -> Comparison:
    """Every tensor of both; all ranks of the world call this and get the same answer.

    ignored: names that one side may have alone.
    """
    ignored = set(ignored)
    found = Comparison()
    for name in sorted(set(first) ^ set(second)):
        if name not in ignored:
            kind: Kind = "surplus" if name in second else "missing"
            found.differences.append(Difference(name, kind, f"{kind} in the second"))
    common = [name for name in first if name in second]
    rank, size = rank_and_size()
    mine = Comparison()
    for name in track(common[rank::size], "comparing", disable=rank > 0, transient=True):
        mine.tensors += 1
        mine.bytes += first.like(name).nbytes
        if difference := _difference(name, first, second):
            mine.differences.append(difference)
    gathered: list[Comparison] = [mine] * size
    if size > 1:
        dist.all_gather_object(gathered, mine)
    for part in gathered:
        found.tensors += part.tensors
        found.bytes += part.bytes
        found.differences += part.differences
    return found


def _difference(name: str, first: Weights, second: Weights) -> Difference | None:
    a, b = first.like(name), second.like(name)
    if a.shape != b.shape:
        return Difference(name, "shape", f"shape {tuple(a.shape)} and {tuple(b.shape)}")
    if a.dtype != b.dtype:
        return Difference(name, "dtype", f"{a.dtype} and {b.dtype}")
    # expert by expert, since all of a layer's can be most of it
    if name.endswith(EXPERTS):
        unequal = [
            i for i in range(a.shape[0]) if _unequal(first.expert(name, i), second.expert(name, i))
        ]
        if unequal:
            return Difference(name, "value", f"experts {unequal[:8]} have other values")
        return None
    if count := _unequal(first[name], second[name]):
        return Difference(name, "value", f"{count} of {a.numel()} elements have other values")
    return None


def _unequal(a: Tensor, b: Tensor) -> int:
    """How many elements differ in their bits."""
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[a.element_size()]
    first, second = a.contiguous().view(bits), b.contiguous().view(bits)
    return 0 if torch.equal(first, second) else int((first != second).sum())
