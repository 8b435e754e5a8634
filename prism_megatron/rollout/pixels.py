"""Preprocessed images on their way to a server: how they are written, and how they are read.

Patches of a still image with 8 bits a channel take a quarter of their bytes: of the two equal
frames one is sent, and of each value its number among the `levels` that occur.
"""

from __future__ import annotations

import base64
from typing import Any

import torch
from torch import Tensor

from prism_megatron.types import VisualInputs

CHANNELS, FRAMES = 3, 2
"""Of a patch of Qwen3-VL, which holds [channels, frames, height, width]."""
MAX_LEVELS = 256


def bf16(image: VisualInputs) -> Tensor:
    """The patches [P, D] in BF16, which is what a vision tower in BF16 makes of them anyway."""
    return image.pixel_values.to(torch.bfloat16).contiguous()


def encode(image: VisualInputs) -> dict[str, Any]:
    """The patches in BF16, as JSON takes them."""
    frames = bf16(image).view(torch.int16).view(len(image.pixel_values), CHANNELS, FRAMES, -1)
    if torch.equal(frames[:, :, 0], frames[:, :, 1]):
        frames = frames[:, :, :1]
    bits = frames.flatten().int() & 0xFFFF
    levels = torch.bincount(bits, minlength=2**16).nonzero()[:, 0]
    few = len(levels) <= MAX_LEVELS
    numbers = torch.zeros(2**16, dtype=torch.uint8)
    numbers[levels] = torch.arange(len(levels)).to(torch.uint8)
    return {
        "values": _text(numbers[bits] if few else frames),
        "levels": _text(levels.to(torch.int16)) if few else "",
        "frames": frames.shape[2],
    }


def decode(encoded: dict[str, Any], patches: int) -> Tensor:
    """[patches, D] BF16 from what `encode` made."""
    if encoded["levels"]:
        numbers = _tensor(encoded["values"], torch.uint8).int()
        values = _tensor(encoded["levels"], torch.bfloat16)[numbers]
    else:
        values = _tensor(encoded["values"], torch.bfloat16)
    frames = values.view(patches, CHANNELS, encoded["frames"], -1)
    return frames.expand(-1, -1, FRAMES, -1).reshape(patches, -1)


def _text(values: Tensor) -> str:
    return base64.b64encode(values.contiguous().view(torch.uint8).numpy()).decode()


def _tensor(encoded: str, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(encoded)), dtype=dtype)
