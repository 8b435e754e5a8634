"""Stored weights of either format, and the comparison of two: names, shapes, types and bits."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
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

    @cached_property
    def _names(self) -> frozenset[str]:
        return frozenset(self)

    def __contains__(self, name: object) -> bool:
        # a Mapping's own reads the tensor
        return name in self._names

    def forget(self, name: str) -> None:
        """Take it out of the page cache, if it came from there: it is not read again."""


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
    common = [name for name in first if name in second]
    rank, size = rank_and_size()
    names = track(common[rank::size], "comparing", disable=rank > 0, transient=True)
    mine = compare_tensors(first, second, names)
    gathered: list[Comparison] = [mine] * size
    if size > 1:
        dist.all_gather_object(gathered, mine)
    found = Comparison(differences=_of_names(first, second, ignored))
    for part in gathered:
        found.tensors += part.tensors
        found.bytes += part.bytes
        found.differences += part.differences
    return found


def compare_headers(first: Weights, second: Weights, ignored: Iterable[str] = ()) -> Comparison:
    """Like `compare`, but of names, shapes and types alone, and without other ranks."""
    common = [name for name in first if name in second]
    found = _compare(first, second, common, _of_header)
    found.differences += _of_names(first, second, ignored)
    return found


def compare_tensors(first: Weights, second: Weights, names: Iterable[str]) -> Comparison:
    """Shape, type and every bit of tensors that both have; without other ranks."""
    return _compare(first, second, names, lambda *of: _of_header(*of) or _of_values(*of))


def _compare(
    first: Weights,
    second: Weights,
    names: Iterable[str],
    difference: Callable[[str, Weights, Weights], Difference | None],
) -> Comparison:
    found = Comparison()
    for name in names:
        found.tensors += 1
        found.bytes += first.like(name).nbytes
        if different := difference(name, first, second):
            found.differences.append(different)
    return found


def _of_names(first: Weights, second: Weights, ignored: Iterable[str]) -> list[Difference]:
    found: list[Difference] = []
    for name in sorted((set(first) ^ set(second)) - set(ignored)):
        kind: Kind = "surplus" if name in second else "missing"
        found.append(Difference(name, kind, f"{kind} in the second"))
    return found


def _of_header(name: str, first: Weights, second: Weights) -> Difference | None:
    a, b = first.like(name), second.like(name)
    if a.shape != b.shape:
        return Difference(name, "shape", f"shape {tuple(a.shape)} and {tuple(b.shape)}")
    if a.dtype != b.dtype:
        return Difference(name, "dtype", f"{a.dtype} and {b.dtype}")
    return None


def _of_values(name: str, first: Weights, second: Weights) -> Difference | None:
    # expert by expert, since all of a layer's can be most of it
    if name.endswith(EXPERTS):
        wrong = [
            i
            for i in range(first.like(name).shape[0])
            if unequal(first.expert(name, i), second.expert(name, i))
        ]
        if wrong:
            return Difference(name, "value", f"experts {wrong[:8]} have other values")
        return None
    a, b = first[name], second[name]
    if count := unequal(a, b):
        return Difference(name, "value", f"{count} of {a.numel()} elements have other values")
    return None


def unequal(a: Tensor, b: Tensor) -> int:
    """How many elements differ in their bits."""
    a, b = a.contiguous().flatten(), b.contiguous().flatten()
    # eight bytes at a time, four times as fast as two
    if all(t.nbytes % 8 == t.storage_offset() * t.element_size() % 8 == 0 for t in (a, b)):
        if torch.equal(a.view(torch.int64), b.view(torch.int64)):
            return 0
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return int((a.view(bits) != b.view(bits)).sum())
