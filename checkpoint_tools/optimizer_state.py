"""The distributed optimizer's state in a checkpoint: every rank writes and reads its own, in place.

Each data-parallel rank holds a range of every flattened parameter (main weights and moments). Such
a range is no box of the parameter, but it is made of a few: the end of a row, whole rows, the
beginning of a row. Under those a rank writes its state, straight from where it lies, into tensors
of the parameter's shape, which any other layout can read:

    parameter [4, 3], elements 2 to 10      ..x      one box each of
                                            xxx      [1, 1]
                                            xxx      [2, 3]
                                            x..      [1, 1]

    optimizer.state.{param, exp_avg, exp_avg_sq}.NAME     NAME: the weight's own key

megatron.core's formats that load at other layouts want all of it gathered on every rank first
(distrib_optimizer.py, sharded_param_state_fully_reshardable); their checkpoints, whose tensors are
cut as the weights are, are read as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

from checkpoint_tools.headers import OPTIMIZER


class _Range(NamedTuple):
    """Of one parameter, the elements whose state this rank holds."""

    parameter: Tensor
    places: list[tuple[int, ShardedTensor]]
    """Where the parameter's elements go, each with the number of its first one."""
    start: int
    stop: int


Pieces = dict[int, dict[str, list[ShardedTensor]]]
Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offset and size."""
Cut = Callable[
    [ShardedTensor, int, int, Tensor],
    Iterator[tuple[tuple[int, ...], tuple[int, ...], Tensor | torch.dtype]],
]
"""Elements start to stop of a place and their values -> boxes, with values or their type."""


class OptimizerState:
    """That of one of megatron.core's distributed optimizers."""

    def __init__(self, part: Any, weights: dict[int, Any]) -> None:
        """weights: each chunk's sharded_state_dict, which nothing has been done with yet."""
        self._part = part
        self._ranges: list[_Range] = []
        # a rank that has nothing to train has a stub
        if not part.is_stub_optimizer:
            # otherwise the inner optimizer has the main weights, maybe scaled
            assert not part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
            entries = {
                id(entry.data): entry for chunk in weights.values() for entry in chunk.values()
            }
            self._ranges = [
                _Range(
                    parameter,
                    _places(entries[id(parameter)]),
                    span["param"].start,
                    span["param"].end,
                )
                for buffer in part.gbuf_ranges
                for buckets in buffer.values()
                for bucket in buckets
                for parameter, span in bucket["param_map"].items()
            ]

    @property
    def step(self) -> int:
        """How many updates were made."""
        return max((int(counter.get("step", 0)) for counter in self._counters()), default=0)

    def to_write(self) -> Pieces:
        """The state as it lies, this rank's part."""
        return self._pieces(_split)

    def to_read(self) -> Pieces:
        """The whole rows that this rank needs some of, without data."""
        return self._pieces(_rows)

    def _pieces(self, cut: Cut) -> Pieces:
        return {
            index: {
                name: [
                    _piece(name, place, offset, size, values)
                    for place, start, stop, flat in _parts(found, tensor)
                    for offset, size, values in cut(place, start, stop, flat)
                ]
                for name, tensor in self._tensors(found.parameter).items()
            }
            for index, found in enumerate(self._ranges)
        }

    def restore(self, step: int, loaded: dict[int, dict[str, list[Tensor]]]) -> None:
        """Take over the step, and what the pieces of to_read were filled with."""
        for counter in self._counters():
            if isinstance(counter.get("step"), Tensor):
                counter["step"].fill_(step)
            else:
                counter["step"] = step
        for index, found in enumerate(self._ranges):
            for name, tensor in self._tensors(found.parameter).items():
                read = iter(loaded[index][name])
                for place, start, stop, flat in _parts(found, tensor):
                    ahead = start % math.prod(place.local_shape[1:])
                    flat.copy_(next(read).flatten()[ahead : ahead + stop - start])

    def _counters(self) -> list[dict[str, Any]]:
        """What has the number of updates as its "step": with torch's Adam each parameter's state,
        with Transformer Engine's each group, from the first update on."""
        if self._part.is_stub_optimizer:
            return []
        inner = self._part.optimizer
        return [state for state in inner.state.values() if "step" in state] or inner.param_groups

    def _tensors(self, parameter: Tensor) -> dict[str, Tensor]:
        """By name: the main weights and moments of a parameter's elements that are this rank's."""
        group, order = self._part.model_param_group_index_map[parameter]
        main = self._part.optimizer.param_groups[group]["params"][order]
        return {"param": main} | {
            name: value
            for name, value in self._part.optimizer.state[main].items()
            # not torch's count of steps
            if isinstance(value, Tensor) and value.dim()
        }


def _places(entry: ShardedTensor | ShardedTensorFactory) -> list[tuple[int, ShardedTensor]]:
    """The tensor that a parameter is stored as, or those: gate and up lie in one parameter."""
    if isinstance(entry, ShardedTensor):
        return [(0, entry)]
    built = replace(entry, data=torch.empty(entry.data.shape, device="meta")).build()
    for place in built:
        assert place.data.is_contiguous(), place
    return [(place.data.storage_offset(), place) for place in built]


def _parts(found: _Range, tensor: Tensor) -> Iterator[tuple[ShardedTensor, int, int, Tensor]]:
    """(place, start, stop, values): the elements of a place whose state this rank holds, counted
    from its first one."""
    flat = tensor.detach().view(-1)
    for begin, place in found.places:
        start = max(found.start, begin)
        stop = min(found.stop, begin + math.prod(place.local_shape))
        if start < stop:
            values = flat[start - found.start : stop - found.start]
            yield place, start - begin, stop - begin, values


def boxes(shape: Sequence[int], start: int, stop: int) -> Iterator[Box]:
    """The boxes, one after the other, that elements start to stop of a flattened tensor are."""
    if len(shape) == 1:
        yield (start,), (stop - start,)
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row
    if first > last:
        # within one row
        yield from _in_row(shape, last, start - last * row, stop - last * row)
        return
    if start < first * row:
        yield from _in_row(shape, first - 1, start - (first - 1) * row, row)
    if first < last:
        yield (first, *[0] * len(shape[1:])), (last - first, *shape[1:])
    if last * row < stop:
        yield from _in_row(shape, last, 0, stop - last * row)


def _in_row(shape: Sequence[int], row: int, start: int, stop: int) -> Iterator[Box]:
    for offset, size in boxes(shape[1:], start, stop):
        yield (row, *offset), (1, *size)


def _split(
    place: ShardedTensor, start: int, stop: int, flat: Tensor
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], Tensor]]:
    """The boxes (offset, size, values) of a range of a place."""
    for offset, size in boxes(place.local_shape, start, stop):
        values, flat = flat.tensor_split([math.prod(size)])
        yield offset, size, values


def _rows(
    place: ShardedTensor, start: int, stop: int, flat: Tensor
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], torch.dtype]]:
    """The box of the whole rows that have some of a range of a place."""
    shape = place.local_shape
    row = math.prod(shape[1:])
    first, last = start // row, -(-stop // row)
    yield (first, *[0] * len(shape[1:])), (last - first, *shape[1:]), flat.dtype


def _piece(
    name: str,
    place: ShardedTensor,
    offset: tuple[int, ...],
    size: tuple[int, ...],
    values: Tensor | torch.dtype,
) -> ShardedTensor:
    """A box of one of the tensors; values: or the type of what is to be read."""
    # layers and experts are axes before those of a parameter, one of them in each place
    ahead = place.prepend_axis_num
    shape = (*[1] * ahead, *size)
    return ShardedTensor(
        key=f"{OPTIMIZER}state.{name}.{place.key}",
        data=values.view(shape) if isinstance(values, Tensor) else None,
        dtype=values.dtype if isinstance(values, Tensor) else values,
        local_shape=shape,
        global_shape=place.global_shape,
        global_offset=tuple(
            a + b for a, b in zip(place.global_offset, (*[0] * ahead, *offset), strict=True)
        ),
        # boxes of any size
        axis_fragmentations=None,
        # pipeline, tensor, data: no other rank of data parallelism has this box
        replica_id=(*place.replica_id[:2], 0),
        allow_shape_mismatch=place.allow_shape_mismatch,
    )
