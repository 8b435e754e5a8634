"""Packed (THD) sequences in megatron.core's terms."""

from __future__ import annotations

from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor
from torch.distributed import ProcessGroup

from model_providers.backend import Backend


def packed_seq_params(
    cu_seqlens: Tensor, backend: Backend, context: ProcessGroup | None = None
) -> PackedSeqParams:
    """cu_seqlens [S+1] int32 -> what attention and rotary embedding need to know of the row.

    With a group of context-parallel ranks, cu_seqlens are those of ContextShare: sequences with the
    padding at their ends, which causal attention never lets their tokens see.
    """
    ranks, rank = (context.size(), context.rank()) if context is not None else (1, 0)
    longest = int(cu_seqlens.diff().max())
    params = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
    if ranks > 1:
        params.cu_seqlens_q_padded = params.cu_seqlens_kv_padded = cu_seqlens
    if backend.device.type == "cpu":
        from model_providers.cpu_layers import attention_groups

        params.groups = attention_groups(cu_seqlens, ranks, rank)  # type: ignore[attr-defined]
        if ranks == 1:
            # angles come one a token, so the rotary embedding may take the row as one sequence
            # instead of slicing it per sequence in Python
            whole = cu_seqlens[[0, -1]]
            params.cu_seqlens_q_padded = params.cu_seqlens_kv_padded = whole
    return params
