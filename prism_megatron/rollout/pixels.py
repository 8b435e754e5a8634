"""Preprocessed images on their way to a server: how they are written, and how they are read.

Patches of a still image with 8 bits a channel take a quarter of their bytes: of the two equal
frames one is sent, and of each value its number among the `levels` that occur. By NumPy, since
many images are written at once, and torch would take all cores for each.
"""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
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
    bits = bf16(image).view(torch.int16).numpy().view(np.uint16)
    frames = bits.reshape(len(bits), CHANNELS, FRAMES, -1)
    if np.array_equal(frames[:, :, 0], frames[:, :, 1]):
        frames = frames[:, :, :1]
    levels = np.flatnonzero(np.bincount(frames.ravel(), minlength=2**16))
    few = len(levels) <= MAX_LEVELS
    if few:
        numbers = np.zeros(2**16, np.uint8)
        numbers[levels] = np.arange(len(levels))
    return {
        "values": _text(numbers.take(frames) if few else frames),
        "levels": _text(levels.astype(np.uint16)) if few else "",
        "frames": frames.shape[2],
    }


def decode(encoded: dict[str, Any], patches: int) -> Tensor:
    """[patches, D] BF16 from what `encode` made."""
    if encoded["levels"]:
        levels = np.frombuffer(base64.b64decode(encoded["levels"]), np.uint16)
        bits = levels.take(np.frombuffer(base64.b64decode(encoded["values"]), np.uint8))
    else:
        bits = np.frombuffer(base64.b64decode(encoded["values"]), np.uint16)
    frames = bits.reshape(patches, CHANNELS, encoded["frames"], -1)
    shape = (patches, CHANNELS, FRAMES, frames.shape[-1])
    whole = np.broadcast_to(frames, shape).reshape(patches, -1)
    # one frame was copied into two, and two are as they were received
    whole = whole if whole.flags.writeable else whole.copy()
    return torch.from_numpy(whole.view(np.int16)).view(torch.bfloat16)


def _text(values: NDArray[Any]) -> str:
    return base64.b64encode(np.ascontiguousarray(values)).decode()
