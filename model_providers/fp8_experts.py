r"""The experts' products in FP8, one kernel a product for all experts of a rank.

    tokens [T, in] ------rows-----> E4M3 [T, in], scales [T] --------\
                                                                      grouped product --> [T, out]
    weight [E, out, in] --rows----> E4M3 [E, out, in], scales [E, out]/

    slope [T, out] ------rows-----> E4M3 [T, out], scales [T] -------\
                                                                      grouped product --> [T, in]
    weight [E, out, in] --columns-> E4M3 [E, in, out], scales [E, in] /

Every row of an operand, along what is summed over, has a scale of its own: its largest magnitude
becomes E4M3's. The weights' gradients are products in BF16 (the recipe "rowwise_with_gw_hp" of
torchao): casting their operands, whose rows are an expert's tokens, takes as long as FP8 saves.
Transformer Engine casts and multiplies expert by expert, which the host can't queue in time where
a rank has many (docs/gpu.md).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from transformer_engine.pytorch.quantization import FP8GlobalStateManager

from model_providers import experts

E4M3 = torch.float8_e4m3fn
LARGEST = tl.constexpr(448.0)
TINY = tl.constexpr(1e-12)
"""Rows of zeros have this largest magnitude."""


def grouped_product(tokens: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """As experts.grouped_product, in FP8 in layers that are.

    bf16_first_layers and bf16_last_layers, and whoever computes such a layer again, say so by
    Transformer Engine's context.
    """
    if not FP8GlobalStateManager.is_fp8_enabled():
        return experts.grouped_product(tokens, weight, ends)
    product: Tensor = _Product.apply(tokens, weight, ends)
    return product


class _Product(torch.autograd.Function):
    """See the top of the file."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(tokens, weight, ends)
        return _scaled(by_rows(tokens), by_rows(weight), ends)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        tokens, weight, ends = ctx.saved_tensors
        slope = slope.contiguous()
        of_tokens = of_weight = None
        if ctx.needs_input_grad[0]:
            of_tokens = _scaled(by_rows(slope), by_columns(weight), ends)
        if ctx.needs_input_grad[1]:
            of_weight = F.grouped_mm(slope.T, tokens, offs=ends)
        return of_tokens, of_weight, None


def _scaled(tokens: tuple[Tensor, Tensor], weight: tuple[Tensor, Tensor], ends: Tensor) -> Tensor:
    """[T, k] of tokens and [E, n, k] of weights with their scales -> [T, n] in BF16."""
    (rows, row_scales), (columns, column_scales) = tokens, weight
    if not len(rows):
        return rows.new_empty(0, columns.shape[1], dtype=torch.bfloat16)
    return F.scaled_grouped_mm(
        rows,
        columns.transpose(1, 2),
        row_scales,
        F.ScalingType.RowWise,
        column_scales,
        F.ScalingType.RowWise,
        offs=ends,
        output_dtype=torch.bfloat16,
        use_fast_accum=True,
    )


def by_rows(values: Tensor) -> tuple[Tensor, Tensor]:
    """values [..., n], contiguous -> in E4M3, and the scales [...] in fp32 to multiply it by."""
    assert values.is_contiguous(), "the kernel counts rows"
    size = values.shape[-1]
    cast = torch.empty_like(values, dtype=E4M3)
    scales = torch.empty(values.shape[:-1], dtype=torch.float32, device=values.device)
    if values.numel():
        _rows[(scales.numel(),)](
            values, cast, scales, size, BLOCK=triton.next_power_of_2(size), num_warps=4
        )
    return cast, scales


def by_columns(values: Tensor) -> tuple[Tensor, Tensor]:
    """values [E, m, n], contiguous -> the columns of each matrix as rows in E4M3, [E, n, m], and
    the scales [E, n] in fp32 to multiply these by."""
    assert values.is_contiguous(), "the kernel counts matrices and rows"
    count, rows, columns = values.shape
    cast = torch.empty(count, columns, rows, dtype=E4M3, device=values.device)
    scales = torch.empty(count, columns, dtype=torch.float32, device=values.device)
    # measured with 1,536 x 2,048 and 3,072 x 4,096
    width, height = 64, 128
    _columns[(triton.cdiv(columns, width), count)](
        values, cast, scales, rows, columns, WIDTH=width, HEIGHT=height, num_warps=4
    )
    return cast, scales


@triton.jit
def _rows(values, cast, scales, size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < size
    read = tl.load(values + row * size + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(read)), TINY) / LARGEST
    tl.store(cast + row * size + at, tl.div_rn(read, scale).to(cast.dtype.element_ty), mask=inside)
    tl.store(scales + row, scale)


@triton.jit
def _columns(values, cast, scales, rows, columns, WIDTH: tl.constexpr, HEIGHT: tl.constexpr):
    matrix = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    inside = (column < columns)[None, :]
    values += matrix * rows * columns
    cast += matrix * rows * columns
    largest = tl.zeros((WIDTH,), tl.float32)
    for first in range(0, rows, HEIGHT):
        row = first + tl.arange(0, HEIGHT)
        mask = (row < rows)[:, None] & inside
        read = tl.load(values + row[:, None] * columns + column[None, :], mask=mask, other=0.0)
        largest = tl.maximum(largest, tl.max(tl.abs(read.to(tl.float32)), 0))
    scale = tl.maximum(largest, TINY) / LARGEST
    tl.store(scales + matrix * columns + column, scale, mask=column < columns)
    for first in range(0, rows, HEIGHT):
        row = first + tl.arange(0, HEIGHT)
        mask = (row < rows)[:, None] & inside
        read = tl.load(values + row[:, None] * columns + column[None, :], mask=mask, other=0.0)
        exact = tl.div_rn(read.to(tl.float32), tl.broadcast_to(scale[None, :], (HEIGHT, WIDTH)))
        turned = tl.trans(exact.to(cast.dtype.element_ty))
        tl.store(cast + column[:, None] * rows + row[None, :], turned, mask=tl.trans(mask))
