"""FP8 weights in blocks, DeepSeek-V3's layout: W = q * scale for each block of 128 x 128.

    name.weight             float8_e4m3fn  [rows, columns]
    name.weight_scale_inv   float32        [rows / 128, columns / 128]

Which matrices are quantised, what they are called and how they are rounded, for checkpoints on disk
(checkpoint_tools.quantize) and for weights on their way to an engine (weight_plan.py) alike. Only
the decoder's projections and experts are; engines read quantised experts one by one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor

BLOCK = 128
FP8_MAX = 448.0
"""Largest float8_e4m3fn."""
SCALE = "_scale_inv"
PROJECTION = re.compile(
    r"model\.language_model\.layers\.\d+\."
    r"(self_attn\.[qkvo]_proj|mlp\.(experts\.\d+\.)?(gate|up|down)_proj)\.weight"
)
_FUSED = re.compile(r"(.*\.mlp\.experts)\.(gate_up|down)_proj")


def projections(stored: str, num_experts: int) -> list[str]:
    """Names of the matrices that a tensor of the Hugging Face layout becomes, in the order of its
    rows; none if it stays as it is."""
    if fused := _FUSED.fullmatch(stored):
        parts = ("gate", "up") if fused[2] == "gate_up" else ("down",)
        return [f"{fused[1]}.{e}.{part}_proj.weight" for e in range(num_experts) for part in parts]
    return [stored] if PROJECTION.fullmatch(stored) else []


def quantize_blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[rows, columns] -> the same in float8_e4m3fn, and fp32 [rows / 128, columns / 128] by which
    its blocks are to be multiplied. Both sizes are multiples of 128. The same bits on every
    device."""
    rows, columns = weight.shape
    quantised = torch.empty_like(weight, dtype=torch.float8_e4m3fn)
    scale = weight.new_empty((rows // BLOCK, columns // BLOCK), dtype=torch.float32)
    round_blocks(weight, quantised, scale)
    return quantised, scale


@torch.no_grad()
def round_blocks(weight: Tensor, quantised: Tensor, scale: Tensor) -> None:
    """Write what quantize_blocks gives: a sync does it for each matrix, and the host queues these
    few kernels no faster than the device computes them."""
    rows, columns = weight.shape
    grid = (rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
    blocks = weight.reshape(grid)
    largest = torch.linalg.vector_norm(blocks, torch.inf, dim=(1, 3)).float()
    # by a tensor: CUDA would multiply by the rounded reciprocal of a number
    torch.div(largest, _fp8_max(weight.device), out=scale)
    # blocks of zeros, and of what is next to them: quotients by subnormal numbers could be anything
    scale.masked_fill_(scale < torch.finfo(torch.float32).tiny, 1.0)
    # at most FP8_MAX but for the division's rounding, which the cast rounds away
    quantised.view(grid).copy_(blocks / scale[:, None, :, None])


@cache
def _fp8_max(device: torch.device) -> Tensor:
    return torch.full((), FP8_MAX, device=device)


def quantization_config(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Any]:
    """What config.json says of a model that holds these, quantised ones among them.

    Engines quantise every linear layer that is not named as kept.
    """
    kept = sorted(
        name.removesuffix(".weight")
        for name, tensor in tensors
        if name.endswith(".weight") and tensor.dim() == 2 and tensor.element_size() > 1
    )
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": kept,
    }
