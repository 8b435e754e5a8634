"""Copies in host memory: where they lie, and that a saved one is no larger than it is."""

from __future__ import annotations

import io
import random

import torch

from model_providers.host_memory import ALIGNMENT, BLOCK, on_host, places


def test_places_do_not_overlap_and_waste_little() -> None:
    drawn = random.Random(3)
    many = [drawn.randrange(1, 2 ** drawn.randrange(10, 31)) for _ in range(500)]
    # main weights and moments in BF16 of a few layers of 8B's width, and its embedding
    layers = 6 * [4 * n for n in (4096 * 6144, 4096 * 4096, 24576 * 4096, 12288 * 4096, 4096)]
    eight = [*layers, *2 * [size // 2 for size in layers], 4 * 151936 * 4096]
    for sizes in (many, eight, [0, 5, 0], [BLOCK], []):
        found, blocks = places(sizes)
        assert all(block & (block - 1) == 0 for block in blocks)
        spans = sorted(
            (block, start, start + size) for (block, start), size in zip(found, sizes, strict=True)
        )
        followers = [*spans[1:], (len(blocks), 0, 0)]
        for (block, start, end), after in zip(spans, followers[: len(spans)], strict=True):
            assert start % ALIGNMENT == 0 and end <= max(blocks[block], 1)
            assert after[0] > block or after[1] >= end
    for sizes in (many, eight):
        assert sum(places(sizes)[1]) < 1.04 * sum(sizes)
    # what torch makes of them
    assert sum(1 << (size - 1).bit_length() for size in eight) > 1.25 * sum(eight)


def test_copies_are_like_their_tensors_and_are_saved_alone() -> None:
    tensors = [
        torch.randn(7, 3),
        torch.randn(11, 5).bfloat16().T,
        torch.tensor(4.0),
        torch.arange(1000),
        torch.empty(0, 3),
    ]
    copies = on_host(tensors)
    for copy, tensor in zip(copies, tensors, strict=True):
        copy.copy_(tensor)
    for copy, tensor in zip(copies, tensors, strict=True):
        assert copy.dtype == tensor.dtype and copy.is_contiguous() and torch.equal(copy, tensor)
        assert copy.untyped_storage().nbytes() == tensor.nbytes
    written = io.BytesIO()
    torch.save(copies[0], written)
    assert len(written.getvalue()) < 4000
