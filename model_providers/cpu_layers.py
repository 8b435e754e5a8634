"""Layers of the CPU backend: megatron.core's own linears, with norms and attention in plain torch.

megatron.core's torch norm refuses sequence parallelism and its local attention refuses packed
sequences; these two do both.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.distributed import ProcessGroup


class TorchNorm(nn.Module):
    """RMSNorm or LayerNorm, whichever `config.normalization` names; fp32 inside.

    Under sequence parallelism each tensor-parallel rank sees its own tokens only, so the
    parameters are marked for megatron.core to sum their gradients over the ranks.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.bias: nn.Parameter | None = None
        if config.normalization == "LayerNorm":
            self.bias = nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype))
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is not None:
            return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)
        # normalise in fp32, cast, then scale: transformers' order (Qwen3VLTextRMSNorm)
        return self.weight * F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype)


class PackedAttention(nn.Module):
    """Scaled dot-product attention within each packed sequence.

    Sequences of like length run as one padded batch: lengths are rounded up to a power of two and
    grouped, so at most half of a batch is padding.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        **unused: Any,
    ) -> None:
        super().__init__()
        assert attention_type == "self"
        self.causal = attn_mask_type == AttnMaskType.causal

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """query [T, heads, d], key and value [T, kv_heads, d] -> [T, heads * d]."""
        assert packed_seq_params is not None, "sequences come packed"
        plan = packed_seq_params.groups  # type: ignore[attr-defined]
        angles = packed_seq_params.angles.squeeze(1)  # type: ignore[attr-defined]
        query, key = rotate(query, angles), rotate(key, angles)
        out = query.new_empty(query.shape)
        for index, lengths in plan:
            out = out.index_put((index[lengths],), self._group(query, key, value, index, lengths))
        return out.flatten(1)

    def _group(
        self, query: Tensor, key: Tensor, value: Tensor, index: Tensor, valid: Tensor
    ) -> Tensor:
        """index [B, L] token positions, valid [B, L] bool -> attention output of valid tokens."""
        q, k, v = (tensor[index].transpose(1, 2) for tensor in (query, key, value))
        # right padding is never seen by earlier tokens of a causal sequence
        mask = None if self.causal or bool(valid.all()) else valid[:, None, None, :]
        attended = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=self.causal, enable_gqa=q.shape[1] != k.shape[1]
        )
        return attended.transpose(1, 2)[valid]


def rotate(states: Tensor, angles: Tensor) -> Tensor:
    """Rotary embedding: [T, heads, d] by [T, 1, d], pairing value i with value i + d / 2."""
    first, second = states.chunk(2, dim=-1)
    return states * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()


def attention_groups(cu_seqlens: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Sequences grouped by rounded-up length: (token positions [B, L], which are real [B, L]).

    Computed once a micro-batch and shared by all layers.
    """
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    groups = []
    rounded = torch.exp2(torch.ceil(torch.log2(lengths.clamp(min=1).double()))).long()
    for size in rounded.unique().tolist():
        members = (rounded == size) & (lengths > 0)
        if not bool(members.any()):
            continue
        start, length = starts[members], lengths[members]
        offsets = torch.arange(int(length.max()))
        valid = offsets[None] < length[:, None]
        groups.append((torch.where(valid, start[:, None] + offsets, start[:, None]), valid))
    return groups


def cross_entropy(logits: Tensor, labels: Tensor, group: ProcessGroup) -> Tensor:
    """-log p(labels) [T] in fp32 of logits [T, vocab / tensor]."""
    loss: Tensor = vocab_parallel_cross_entropy(
        logits.unsqueeze(1).float(), labels.unsqueeze(1), tp_group=group
    )
    return loss.squeeze(1)


class TorchSpecProvider(LocalSpecProvider):
    """megatron.core's local layers with the two modules above."""

    def layer_norm(
        self, rms_norm: bool = False, for_qk: bool = False, has_residual: bool = False
    ) -> Any:
        return TorchNorm

    def core_attention(self) -> type:
        return PackedAttention
