"""Plans of checkpoints whose layers and experts are stacked in one tensor."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.checkpoint import default_planner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan

import checkpoint_tools.torch_dist  # noqa: F401, which has torch look at places

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


def is_valid(chunks: list[Chunk]) -> bool:
    stored = TensorStorageMetadata(
        TensorProperties(torch.float32),
        torch.Size((LAYERS, EXPERTS, ROWS, COLUMNS)),
        [ChunkStorageMetadata(torch.Size(o), torch.Size(s)) for o, s in chunks],
    )
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
