"""Packed (THD) sequences in megatron.core's terms."""

from __future__ import annotations

from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor
from torch.distributed import ProcessGroup

from model_providers.backend import Backend


def packed_seq_params(
    cu_seqlens: Tensor, angles: Tensor, backend: Backend, context: ProcessGroup | None = None
) -> PackedSeqParams:
    """What attention needs to know of a row of S packed sequences.

    cu_seqlens [S+1] int32 on the host, so that no forward waits for the device; angles
    [T, 1, 1, head_dim] of this rank's tokens: the backend's attention rotates queries and keys
    itself, each token by its own.

    With a group of context-parallel ranks, cu_seqlens are those of ContextShare: sequences with the
    padding at their ends, which causal attention never lets their tokens see.
    """
    ranks, rank = (context.size(), context.rank()) if context is not None else (1, 0)
    longest = int(cu_seqlens.diff().max())
    bounds = backend.to_device(cu_seqlens)
    params = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
    if ranks > 1:
        params.cu_seqlens_q_padded = params.cu_seqlens_kv_padded = bounds
    params.angles = angles  # type: ignore[attr-defined]
    if backend.device.type == "cpu":
        from model_providers.cpu_layers import attention_groups

        params.groups = attention_groups(cu_seqlens, ranks, rank)  # type: ignore[attr-defined]
    return params
