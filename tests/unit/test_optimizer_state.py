"""Ranges of flattened tensors as boxes."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from checkpoint_tools.optimizer_state import boxes

SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=4)


@given(SHAPES, st.data())
def test_boxes_are_the_range_in_order_and_are_few(shape: list[int], data: st.DataObject) -> None:
    numbers = torch.arange(math.prod(shape)).view(shape)
    start = data.draw(st.integers(0, numbers.numel() - 1))
    stop = data.draw(st.integers(start + 1, numbers.numel()))
    found = list(boxes(shape, start, stop))
    cut = [
        numbers[tuple(slice(o, o + s) for o, s in zip(offset, size, strict=True))]
        for offset, size in found
    ]
    assert torch.cat([part.flatten() for part in cut]).tolist() == list(range(start, stop))
    assert len(found) <= 2 * len(shape) - 1


def test_a_range_across_rows_is_an_end_whole_rows_and_a_beginning() -> None:
    assert list(boxes((4, 3), 2, 10)) == [((0, 2), (1, 1)), ((1, 0), (2, 3)), ((3, 0), (1, 1))]
    assert list(boxes((4, 3), 3, 9)) == [((1, 0), (2, 3))]
    assert list(boxes((4, 3), 4, 5)) == [((1, 1), (1, 1))]
    assert list(boxes((12,), 2, 10)) == [((2,), (8,))]
