"""The comparison of stored tensors."""

from __future__ import annotations

import pytest
import torch

from checkpoint_tools.weights import unequal


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.int64])
@pytest.mark.parametrize("start", [0, 1, 4])
@pytest.mark.parametrize("length", [1, 3, 8, 24])
def test_a_single_bit_is_found_wherever_it_is(dtype: torch.dtype, start: int, length: int) -> None:
    """Whether or not the bytes can be looked at eight at a time."""
    stored = torch.arange(40, dtype=torch.float32).to(dtype)
    first, second = stored[start : start + length], stored.clone()[start : start + length]
    assert unequal(first, second) == 0
    for index in range(length):
        changed = second.clone()
        changed.view(torch.uint8)[index * changed.element_size()] ^= 1
        assert unequal(first, changed) == 1
        assert unequal(first[None], changed[:, None].T) == 1


def test_values_that_compare_equal_but_are_not_are_found() -> None:
    assert unequal(torch.tensor([0.0, 0.0]), torch.tensor([0.0, -0.0])) == 1
    nan = torch.tensor([torch.nan, 1.0])
    assert unequal(nan, nan.clone()) == 0
