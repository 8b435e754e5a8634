"""Which tokens a context-parallel rank holds."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from model_providers import backend as backends
from model_providers.context import ContextShare
from model_providers.qwen3_vl import Qwen3VLChunk

LENGTHS = [7, 1, 12, 3, 16]


def _share(lengths: list[int], ranks: int, rank: int) -> ContextShare:
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    group: Any = SimpleNamespace(size=lambda: ranks, rank=lambda: rank)
    return ContextShare.of(cu_seqlens, group, backends.create("cpu"))


def test_documented_example() -> None:
    row = torch.tensor([ord(c) for c in "abcdefg"])
    shares = [_share([7], 2, rank).take(row, ord(".")).tolist() for rank in range(2)]
    assert ["".join(map(chr, share)) for share in shares] == ["abg.", "cdef"]


def test_a_lone_rank_has_the_row_as_it_is() -> None:
    share = _share(LENGTHS, 1, 0)
    row = torch.arange(sum(LENGTHS))
    assert torch.equal(share.tokens, row)
    assert torch.equal(share.place, row) and torch.equal(share.take(row, -1), row)
    assert share.cu_seqlens.tolist() == [0, 7, 8, 20, 23, 39]
    assert share.cu_seqlens.dtype == torch.int32


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_every_token_is_on_one_rank_and_found_there(ranks: int) -> None:
    total = sum(LENGTHS)
    shares = [_share(LENGTHS, ranks, rank) for rank in range(ranks)]
    held = torch.cat([share.tokens for share in shares])
    assert held[held < total].sort().values.tolist() == list(range(total))
    assert len({share.tokens.numel() for share in shares}) == 1
    assert torch.equal(held[shares[0].place], torch.arange(total))
    holders, places = shares[0].find(torch.arange(total))
    for token, (holder, place) in enumerate(zip(holders.tolist(), places.tolist(), strict=True)):
        assert shares[holder].tokens[place] == token


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_ranks_have_an_equal_part_of_every_sequence(ranks: int) -> None:
    """Equal work for causal attention: chunks from both ends."""
    share = _share(LENGTHS, ranks, ranks - 1)
    padded = share.cu_seqlens.diff()
    assert not (padded % (2 * ranks)).any()
    assert ((padded - torch.tensor(LENGTHS)) < 2 * ranks).all()
    # the last rank's two chunks are the middle of each sequence
    row = torch.arange(1, sum(LENGTHS) + 1)
    middle = []
    for part, length in zip(row.split(LENGTHS), padded.tolist(), strict=True):
        chunk, whole = length // (2 * ranks), torch.zeros(length, dtype=torch.int64)
        whole[: len(part)] = part
        middle.append(whole[length // 2 - chunk : length // 2 + chunk])
    assert torch.equal(share.take(row, 0), torch.cat(middle))


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_in_routing_replay_every_token_has_all_its_experts(ranks: int) -> None:
    """Padding, too: of fewer, a fused router makes NaN."""
    layers, choices, experts, total = 3, 2, 5, sum(LENGTHS)
    drawn = torch.rand(total, layers, experts, generator=torch.Generator().manual_seed(7))
    batch: Any = SimpleNamespace(routes=drawn.topk(choices).indices.to(torch.uint8))
    chunk: Any = SimpleNamespace(
        routers=[None, None],
        first_router=1,
        architecture=SimpleNamespace(num_experts=experts),
    )
    for rank in range(ranks):
        share = _share(LENGTHS, ranks, rank)
        flags = torch.zeros(share.size, dtype=torch.bool)
        mask = Qwen3VLChunk._router_mask(chunk, batch, share, slice(None), flags, flags.long())
        assert mask is not None
        taken = mask[2:].view(2, experts, share.size)
        assert (taken.sum(1) == choices).all()
        for place, token in enumerate(share.tokens.tolist()):
            if token < total:
                again = taken[:, :, place].nonzero()[:, 1].view(2, choices)
                assert torch.equal(again, batch.routes[token, 1:].long().sort(-1).values)
