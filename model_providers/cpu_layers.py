"""Layers of the CPU backend: megatron.core's own linears, with norms and attention in plain torch.

megatron.core's torch norm refuses sequence parallelism and its local attention refuses packed
sequences; these two do both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    vocab_parallel_cross_entropy,
)
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from model_providers.context import owner, sequence_multiple


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
    grouped, so at most half of a batch is padding. Context-parallel ranks gather keys and values
    from each other, and each attends from its own tokens.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        pg_collection: ProcessGroupCollection,
        **unused: Any,
    ) -> None:
        super().__init__()
        assert attention_type == "self"
        self.causal = attn_mask_type == AttnMaskType.causal
        self.context = pg_collection.cp
        assert self.causal or self.context.size() == 1

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
        """query [T, heads, d], key and value [T, kv_heads, d] -> [T, heads * d], T of this rank."""
        assert packed_seq_params is not None, "sequences come packed"
        angles = packed_seq_params.angles.squeeze(1)  # type: ignore[attr-defined]
        query, key = rotate(query, angles), rotate(key, angles)
        if self.context.size() > 1:
            # backward sums the ranks' gradients and returns each rank its part
            key, value = (
                gather_from_sequence_parallel_region(tensor.contiguous(), group=self.context)
                for tensor in (key, value)
            )
        out = query.new_empty(query.shape)
        for group in packed_seq_params.groups:  # type: ignore[attr-defined]
            rows = group.queries[group.real]
            out = out.index_put((rows,), self._attend(query, key, value, group))
        return out.flatten(1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, group: AttentionGroup) -> Tensor:
        """Attention output of the group's real tokens."""
        q = query[group.queries].transpose(1, 2)
        k, v = (tensor[group.keys].transpose(1, 2) for tensor in (key, value))
        mask = group.mask
        # right padding is never seen by earlier tokens of a causal sequence
        if not self.causal and not bool(group.real.all()):
            mask = group.real[:, None, None, :]
        attended = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=self.causal and mask is None,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        return attended.transpose(1, 2)[group.real]


def rotate(states: Tensor, angles: Tensor) -> Tensor:
    """Rotary embedding: [T, heads, d] by [T, 1, d], pairing value i with value i + d / 2."""
    first, second = states.chunk(2, dim=-1)
    cos, sin = angles.cos().to(states.dtype), angles.sin().to(states.dtype)
    return states * cos + torch.cat([-second, first], dim=-1) * sin


@dataclass(frozen=True)
class AttentionGroup:
    """B sequences of like length, padded to the longest.

    queries [B, Q]  positions among this rank's tokens     real [B, Q] bool  which are no padding
    keys    [B, K]  positions among the tokens of all context-parallel ranks, laid end to end
    mask    [B, 1, Q, K] bool  which keys a query sees; None where both are in order and whole
    """

    queries: Tensor
    real: Tensor
    keys: Tensor
    mask: Tensor | None


def attention_groups(cu_seqlens: Tensor, ranks: int = 1, rank: int = 0) -> list[AttentionGroup]:
    """The sequences grouped by rounded-up length, as context-parallel rank `rank` of `ranks` sees
    them; cu_seqlens [S+1] over all ranks (ContextShare).

    Computed once a micro-batch and shared by all layers.
    """
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    share = int(cu_seqlens[-1]) // ranks
    groups = []
    rounded = torch.exp2(torch.ceil(torch.log2(lengths.clamp(min=1).double()))).long()
    for size in rounded.unique().tolist():
        members = (rounded == size) & (lengths > 0)
        if not bool(members.any()):
            continue
        start, length = starts[members, None], lengths[members, None]
        chunk = length // sequence_multiple(ranks)
        offset = torch.arange(int(length.max()))
        holder, place = owner(offset.minimum(length - 1), chunk, ranks)
        keys = holder * share + start // ranks + place
        local = torch.arange(int(length.max()) // ranks)
        real = local < length // ranks
        queries = start // ranks + torch.where(real, local, 0)
        mask = None
        if ranks > 1:
            behind = (2 * ranks - 1 - rank) * chunk + local - chunk
            position = torch.where(local < chunk, rank * chunk + local, behind)
            mask = (offset <= position[..., None])[:, None]
        groups.append(AttentionGroup(queries, real, keys, mask))
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
