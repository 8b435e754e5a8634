"""Host memory for copies of tensors on a device, without what torch adds to it.

torch rounds each pinned allocation up to a power of two: by 27 percent over the optimizer state of
Qwen3-VL-8B. Copies share blocks whose sizes are powers of two already.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

BLOCK = 2**30
"""Bytes of a block, unless a tensor is larger or the rest smaller."""
ALIGNMENT = 512
"""Bytes that a copy begins at a multiple of, as torch's own allocations do."""


def places(sizes: Sequence[int]) -> tuple[list[tuple[int, int]], list[int]]:
    """Block and offset of each of `sizes` bytes, and the bytes of each block: the largest first,
    each into the first block with room for it."""
    rounded = [-(-size // ALIGNMENT) * ALIGNMENT for size in sizes]
    found = [(0, 0)] * len(sizes)
    blocks, used = list[int](), list[int]()
    remaining = sum(rounded)
    for index in sorted(range(len(sizes)), key=lambda i: -rounded[i]):
        size = rounded[index]
        fitting = (b for b, whole in enumerate(blocks) if used[b] + size <= whole)
        block = next(fitting, len(blocks))
        if block == len(blocks):
            enough = 1 << max(0, size - 1).bit_length()
            blocks.append(max(enough, min(BLOCK, 1 << max(0, remaining.bit_length() - 1))))
            used.append(0)
        found[index] = (block, used[block])
        used[block] += size
        remaining -= size
    return found, blocks


def on_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """For each tensor one in host memory like it, with a storage of its own and arbitrary values;
    pinned where it is on a GPU."""
    copies: dict[int, Tensor] = {}
    for on_gpu in (True, False):
        chosen = [i for i, tensor in enumerate(tensors) if tensor.is_cuda == on_gpu]
        found, sizes = places([tensors[i].nbytes for i in chosen])
        # a slice of an array, unlike one of a tensor, becomes a storage that ends where it does:
        # that is what is written when a tensor is saved
        blocks = [torch.empty(n, dtype=torch.uint8, pin_memory=on_gpu).numpy() for n in sizes]
        for i, (block, start) in zip(chosen, found, strict=True):
            part = torch.from_numpy(blocks[block][start : start + tensors[i].nbytes])
            copies[i] = part.view(tensors[i].dtype).view(tensors[i].shape)
    return [copies[i] for i in range(len(tensors))]
