"""Packed (THD) sequences in megatron.core's terms."""

from __future__ import annotations

from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from model_providers.backend import Backend


def packed_seq_params(cu_seqlens: Tensor, max_seqlen: int, backend: Backend) -> PackedSeqParams:
    """What attention and rotary embedding need to know of a row of S packed sequences.

    cu_seqlens [S+1] int32 on the device; max_seqlen, the longest, is host data, so that no
    forward waits for the device.
    """
    params = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=max_seqlen,
        max_seqlen_kv=max_seqlen,
    )
    if backend.device.type == "cpu":
        from model_providers.cpu_layers import attention_groups

        params.groups = attention_groups(cu_seqlens)  # type: ignore[attr-defined]
        # angles come one a token, so the rotary embedding may take the row as one sequence
        # instead of slicing it per sequence in Python
        whole = cu_seqlens[[0, -1]]
        params.cu_seqlens_q_padded = params.cu_seqlens_kv_padded = whole
    return params
