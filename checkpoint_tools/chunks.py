"""Which chunks of a tensor overlap which, without a look at all pairs of them.

All layers and experts are stacked in one tensor: gates and ups of 94 layers with 128 experts are
24,064 chunks. torch orders chunks along one axis, where most of them lie side by side, and then
compares each with each: when it plans what is written, when it plans what is read, and when it
holds some of them as a sharded tensor. Here chunks are found by their places, for torch as well.

    _Boxes of a tensor [2, 2, 4, 3]       a level an axis, a branch for all that extend alike there

        0:1 --- 0:1 --- 0:4 --- 0:3       box 0
            `-- 1:2 --- 0:2 --- 0:3       box 1
                    `-- 2:4 --- 0:3       box 2
        1:2 --- 0:2 --- 0:4 --- 0:3       box 3
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

from torch import Size
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharding_spec import _internals
from torch.distributed.checkpoint import default_planner, planner_helpers
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem, SavePlan

Box = tuple[Sequence[int], Sequence[int]]
"""Offset and size."""


class _Boxes:
    """Boxes of as many axes each, by where they lie."""

    def __init__(self, boxes: Sequence[Box]) -> None:
        self._boxes = boxes
        self._close: set[int] = set()
        """Those that may overlap others: of the rest some axis tells each two apart."""
        self._tree = self._branch([*range(len(boxes))], 0)

    def _branch(self, numbers: list[int], axis: int) -> Any:
        """(extents in order, the longest, a branch for each), or where nothing is left to tell
        apart the numbers of boxes."""
        if len(numbers) < 2:
            return numbers
        if axis == len(self._boxes[0][0]):
            self._close.update(numbers)
            return numbers
        found: dict[tuple[int, int], list[int]] = {}
        for number in numbers:
            offset, size = self._boxes[number]
            found.setdefault((offset[axis], offset[axis] + size[axis]), []).append(number)
        extents = sorted(found)
        if any(stop > start for (_, stop), (start, _) in pairwise(extents)):
            self._close.update(numbers)
        longest = max(stop - start for start, stop in extents)
        return extents, longest, [self._branch(found[extent], axis + 1) for extent in extents]

    def overlapping(self, box: Box) -> Iterator[int]:
        """The numbers of those that overlap a box."""
        return self._overlapping(box, self._tree, 0)

    def _overlapping(self, box: Box, branch: Any, axis: int) -> Iterator[int]:
        if isinstance(branch, list):
            yield from (number for number in branch if _overlap(box, self._boxes[number]))
            return
        extents, longest, after = branch
        start, stop = box[0][axis], box[0][axis] + box[1][axis]
        # what begins earlier has ended
        first = bisect_right(extents, (start - longest, math.inf))
        last = bisect_left(extents, (stop,))
        for i in range(first, last):
            if extents[i][1] > start:
                yield from self._overlapping(box, after[i], axis + 1)

    def overlap(self) -> tuple[int, int] | None:
        """Two that overlap."""
        for number in self._close:
            for other in self.overlapping(self._boxes[number]):
                if other != number:
                    return number, other
        return None


def _overlap(box: Box, other: Box) -> bool:
    extents = zip(*box, *other, strict=True)
    return all(a < b + m and b < a + n for a, n, b, m in extents)


class Chunks:
    """Those of a stored tensor."""

    def __init__(self, stored: TensorStorageMetadata) -> None:
        self._chunks = stored.chunks
        self._boxes = _boxes(stored.chunks)

    def read_items(self, key: str, wanted: Sequence[ChunkStorageMetadata]) -> list[ReadItem]:
        """What has to be read of which chunk for each of some boxes."""
        return [
            _read_item(key, number, box, near, self._chunks[near])
            for number, box in enumerate(wanted)
            for near in self._boxes.overlapping((box.offsets, box.sizes))
        ]


def _boxes(chunks: Sequence[ChunkStorageMetadata]) -> _Boxes:
    return _Boxes([(chunk.offsets, chunk.sizes) for chunk in chunks])


def _read_item(
    key: str, number: int, box: ChunkStorageMetadata, near: int, chunk: ChunkStorageMetadata
) -> ReadItem:
    """Of the part that is in both."""
    starts = [max(pair) for pair in zip(box.offsets, chunk.offsets, strict=True)]
    stops = [
        min(a + n, b + m)
        for a, n, b, m in zip(box.offsets, box.sizes, chunk.offsets, chunk.sizes, strict=True)
    ]
    return ReadItem(
        type=LoadItemType.TENSOR,
        dest_index=MetadataIndex(key, box.offsets, number),
        dest_offsets=_minus(starts, box.offsets),
        storage_index=MetadataIndex(key, chunk.offsets, near),
        storage_offsets=_minus(starts, chunk.offsets),
        lengths=_minus(stops, starts),
    )


def _minus(those: Sequence[int], these: Sequence[int]) -> Size:
    return Size([a - b for a, b in zip(those, these, strict=True)])


def _read_items(
    key: str, stored: TensorStorageMetadata, wanted: list[ChunkStorageMetadata]
) -> list[ReadItem]:
    return Chunks(stored).read_items(key, wanted)


def _find_overlap(shards: list[ShardMetadata], axes: list[int]) -> tuple[int, int] | None:
    return _Boxes([(shard.shard_offsets, shard.shard_sizes) for shard in shards]).overlap()


_validate = default_planner._validate_global_plan


def _validate_plan(global_plan: list[SavePlan], metadata: Metadata) -> bool:
    """Whether chunks fill their tensors and do not overlap; torch says what is wrong with others,
    and whether that may be."""
    others = {
        key: stored
        for key, stored in metadata.state_dict_metadata.items()
        if isinstance(stored, TensorStorageMetadata) and not _is_filled(stored)
    }
    return not others or _validate(global_plan, Metadata(others))


def _is_filled(stored: TensorStorageMetadata) -> bool:
    return (
        sum(math.prod(chunk.sizes) for chunk in stored.chunks) == math.prod(stored.size)
        and all(
            at >= 0 and at + size <= whole
            for chunk in stored.chunks
            for at, size, whole in zip(chunk.offsets, chunk.sizes, stored.size, strict=True)
        )
        and _boxes(stored.chunks).overlap() is None
    )


planner_helpers.create_read_items_for_chunk_list = _read_items
default_planner._validate_global_plan = _validate_plan
_internals._find_nd_overlapping_shards = _find_overlap
