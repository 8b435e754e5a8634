"""Packed (THD) sequences in megatron.core's terms."""

from __future__ import annotations

from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from model_providers.backend import Backend


def packed_seq_params(
    cu_seqlens: Tensor, max_seqlen: int, angles: Tensor, backend: Backend
) -> PackedSeqParams:
    """What attention needs to know of a row of S packed sequences.

    cu_seqlens [S+1] int32 on the device; max_seqlen, the longest, is host data, so that no
    forward waits for the device. The backend's attention rotates queries and keys itself, each
    token by its own angles [T, 1, 1, head_dim].
    """
    params = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=max_seqlen,
        max_seqlen_kv=max_seqlen,
    )
    params.angles = angles  # type: ignore[attr-defined]
    if backend.device.type == "cpu":
        from model_providers.cpu_layers import attention_groups

        params.groups = attention_groups(cu_seqlens)  # type: ignore[attr-defined]
    return params
