"""Plans of checkpoints whose layers and experts are stacked in one tensor."""

from __future__ import annotations

import importlib.util
import random
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharding_spec import _internals
from torch.distributed.checkpoint import default_planner, planner_helpers
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem, SavePlan

from checkpoint_tools import chunks

LAYERS, EXPERTS, ROWS, COLUMNS = 3, 2, 7, 5
Chunk = tuple[tuple[int, ...], tuple[int, ...]]


def whole() -> list[Chunk]:
    """Each layer's experts in two pieces, with a row that two ranks share."""
    return [
        ((layer, expert, *offset), (1, 1, *size))
        for layer in range(LAYERS)
        for expert in range(EXPERTS)
        for offset, size in [
            ((0, 0), (3, COLUMNS)),
            ((3, 0), (1, 2)),
            ((3, 2), (1, COLUMNS - 2)),
            ((4, 0), (ROWS - 4, COLUMNS)),
        ]
    ]


def chunks_of(boxes: list[Chunk]) -> list[ChunkStorageMetadata]:
    return [ChunkStorageMetadata(torch.Size(o), torch.Size(s)) for o, s in boxes]


def tensor(shape: tuple[int, ...], boxes: list[Chunk]) -> TensorStorageMetadata:
    return TensorStorageMetadata(
        TensorProperties(torch.float32), torch.Size(shape), chunks_of(boxes)
    )


def is_valid(boxes: list[Chunk]) -> bool:
    stored = tensor((LAYERS, EXPERTS, ROWS, COLUMNS), boxes)
    two_ranks = [SavePlan([]), SavePlan([])]
    return default_planner._validate_global_plan(two_ranks, Metadata({"experts": stored}))


def test_pieces_that_fill_a_tensor_are_a_plan() -> None:
    assert is_valid(whole())


@pytest.mark.parametrize(
    "wrong",
    [
        whole()[:-1],
        whole()[:-4],
        [*whole()[:-1], whole()[0]],
        [*whole()[:-1], ((2, 1, 3, 0), (1, 1, ROWS - 4, COLUMNS))],
        [*whole()[:-1], ((2, 1, 5, 0), (1, 1, ROWS - 4, COLUMNS))],
        [*whole()[:-4], *(((2, 2, *o[2:]), s) for o, s in whole()[-4:])],
    ],
    ids=["piece missing", "expert missing", "twice", "overlap", "beyond", "no such expert"],
)
def test_pieces_that_do_not_are_none(wrong: list[Chunk]) -> None:
    assert not is_valid(wrong)


def own(module: ModuleType) -> Any:
    """A module of torch as it is before chunks.py gives it other functions."""
    spec = importlib.util.find_spec(module.__name__)
    assert spec is not None and spec.loader is not None
    fresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)
    return fresh


def partition(shape: tuple[int, ...], rng: random.Random, cuts: int) -> list[Chunk]:
    """Boxes of any size that fill a tensor, in any order."""
    found: list[Chunk] = [((0,) * len(shape), shape)]
    for _ in range(cuts):
        offset, size = found.pop(rng.randrange(len(found)))
        axis = rng.randrange(len(shape)) if shape else 0
        if not shape or size[axis] < 2:
            found.append((offset, size))
            continue
        at = rng.randrange(1, size[axis])
        for start, length in ((0, at), (at, size[axis] - at)):
            moved = (*offset[:axis], offset[axis] + start, *offset[axis + 1 :])
            found.append((moved, (*size[:axis], length, *size[axis + 1 :])))
    rng.shuffle(found)
    return found


def comparable(items: list[ReadItem]) -> list[Any]:
    """With the numbers of both chunks, which do not count in torch's own comparison."""
    return sorted(
        (item.dest_index.index, item.storage_index.index, str(item), str(item.type))
        for item in items
    )


@pytest.mark.parametrize("shape", [(), (31,), (7, 19), (5, 3, 13), (4, 3, 7, 11)], ids=str)
def test_what_is_read_is_what_torch_would_read(shape: tuple[int, ...]) -> None:
    theirs = own(planner_helpers).create_read_items_for_chunk_list
    ours = planner_helpers.create_read_items_for_chunk_list
    assert ours.__module__ == chunks.__name__ != theirs.__module__
    rng = random.Random(len(shape))
    for cuts in (0, 1, 4, 15, 60):
        stored = tensor(shape, partition(shape, rng, cuts))
        # all of it in other pieces, some of its own, and boxes of no size
        wanted = partition(shape, rng, cuts // 2) + partition(shape, rng, cuts)[: cuts // 3]
        wanted += [(offset, (0,) * len(shape)) for offset, _ in wanted[:3] if shape]
        found = ours("key", stored, chunks_of(wanted))
        assert comparable(found) == comparable(theirs("key", stored, chunks_of(wanted)))
        assert len(found) >= len(stored.chunks)
    assert ours("key", tensor(shape, []), chunks_of([(shape, shape)])) == []


@pytest.mark.parametrize("shape", [(7, 19), (5, 3, 13), (4, 3, 7, 11)], ids=str)
def test_boxes_overlap_where_torch_finds_that_they_do(shape: tuple[int, ...]) -> None:
    theirs, rng, answers = own(_internals), random.Random(len(shape)), set()
    for _ in range(60):
        boxes = partition(shape, rng, 25)
        if rng.random() < 0.7:
            offset, size = boxes[0]
            moved = tuple(at - (at > 0 and rng.random() < 0.3) for at in offset)
            boxes[0] = (moved, tuple(n + (rng.random() < 0.3) for n in size))
        shards = [ShardMetadata([*o], [*s], "rank:0/cpu") for o, s in boxes]
        pair = _internals._find_nd_overlapping_shards(shards, [0, 1])
        every = [*range(len(shape))]
        assert (pair is None) == (theirs._find_nd_overlapping_shards(shards, every) is None)
        if pair is not None:
            assert theirs._check_shard_metadata_pair_overlap(*(shards[i] for i in pair))
        answers.add(pair is None)
    assert answers == {True, False}


def test_stacked_chunks_are_not_compared_with_each_other() -> None:
    """Nor with pieces of other layers and experts: neither to write, to read nor to hold them."""
    rows, columns = 8, 6
    boxes: list[Chunk] = [
        ((layer, expert, row, 0), (1, 1, rows // 2, columns))
        for layer in range(10)
        for expert in range(20)
        for row in (0, rows // 2)
    ]
    stored = tensor((10, 20, rows, columns), boxes)
    shards = [ShardMetadata([*o], [*s], "rank:0/cpu") for o, s in boxes]
    with mock.patch.object(chunks, "_overlap", wraps=chunks._overlap) as compared:
        items = planner_helpers.create_read_items_for_chunk_list("key", stored, stored.chunks)
        assert len(items) == compared.call_count == len(boxes)
        _internals.validate_non_overlapping_shards_metadata(shards)
        plans = [SavePlan([]), SavePlan([])]
        assert default_planner._validate_global_plan(plans, Metadata({"key": stored}))
        assert compared.call_count == len(boxes)
