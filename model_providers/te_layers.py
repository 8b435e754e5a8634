"""Layers of the CUDA backend: megatron.core's Transformer Engine modules, attention with its rotary
embedding applied inside.

megatron.core rotates packed queries and keys sequence by sequence on the host; with one angle a
token, one fused kernel does the row.
"""

from __future__ import annotations

from typing import Any

import transformer_engine.pytorch.attention.rope as rope
import transformer_engine.pytorch.optimizers as optimizers
from megatron.core.extensions.transformer_engine import (
    TEDotProductAttention,
    te_parallel_cross_entropy,
)
from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
from megatron.core.optimizer import clip_grads
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor
from torch.distributed import ProcessGroup


class RotaryAttention(TEDotProductAttention):
    """Attention within each packed sequence, on queries and keys that it rotates first."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *args: Any,
        packed_seq_params: PackedSeqParams,
        **kwargs: Any,
    ) -> Tensor:
        """query [T, heads, d], key and value [T, kv_heads, d] -> [T, heads * d]."""
        angles = packed_seq_params.angles  # type: ignore[attr-defined]
        return super().forward(
            _rotate(query, angles),
            _rotate(key, angles),
            value,
            *args,
            packed_seq_params=packed_seq_params,
            **kwargs,
        )


def _rotate(states: Tensor, angles: Tensor) -> Tensor:
    """[T, heads, d] by [T, 1, 1, d], in fp32 inside the kernel."""
    return rope.apply_rotary_pos_emb(states.unsqueeze(1), angles, fused=True).squeeze(1)


def cross_entropy(logits: Tensor, labels: Tensor, group: ProcessGroup) -> Tensor:
    """-log p(labels) [T] in fp32 of logits [T, vocab / tensor], which are overwritten."""
    loss: Tensor = te_parallel_cross_entropy(
        logits.unsqueeze(1),
        labels.unsqueeze(1),
        group,
        # otherwise the backward pass waits for the device to see whether its gradient is 1
        is_cg_capturable=True,
    )
    return loss.squeeze(1)


def use_fused_norm() -> None:
    """Have gradients' norm and clipping computed by Transformer Engine's kernels.

    megatron.core 0.19 (optimizer/clip_grads.py) takes all of them or none, and one that it has no
    use for here came with 2.13. Its own functions read one number a parameter from the device.
    """
    if clip_grads.multi_tensor_scale_tensor_impl is None:
        clip_grads.multi_tensor_applier = optimizers.multi_tensor_applier
        clip_grads.l2_norm_impl = optimizers.multi_tensor_l2norm
        clip_grads.multi_tensor_scale_impl = optimizers.multi_tensor_scale


class TransformerEngineSpecProvider(TESpecProvider):
    """megatron.core's Transformer Engine layers with the attention above."""

    def core_attention(self) -> type:
        return RotaryAttention
