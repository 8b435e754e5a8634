from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from prism_megatron.data.mrope import mrope_positions
from prism_megatron.data.packing import pack, packed_length, plan_micro_batches
from prism_megatron.types import (
    Dropout,
    FeatureExchange,
    ImageShare,
    Noise,
    PackedBatch,
    Sequence,
    VisualInputs,
)

IMAGE, VIDEO, PAD, MERGE, PATCH_VALUES = 50, 51, 9, 2, 5
TOKENS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "merge_size": MERGE}
SETTINGS = TOKENS | {"pad_id": PAD}


def image(key: str, h: int, w: int) -> VisualInputs:
    generator = torch.Generator().manual_seed(ord(key))
    return VisualInputs(key, torch.randn(h * w, PATCH_VALUES, generator=generator), (1, h, w))


A, B = image("a", 2, 6), image("b", 4, 4)


def sequence(parts: list[int | VisualInputs], num_response: int) -> Sequence:
    tokens: list[int] = []
    for part in parts:
        tokens += [part] if isinstance(part, int) else [IMAGE] * (len(part.pixel_values) // 4)
    length = len(tokens)
    return Sequence(
        input_ids=torch.tensor(tokens),
        images=tuple(part for part in parts if isinstance(part, VisualInputs)),
        response_mask=torch.arange(length) >= length - num_response,
        per_token={"advantages": torch.arange(length) + 0.5},
    )


def test_documented_example() -> None:
    batch = pack([sequence([1, 2, 3, 4], 2), sequence([5, 6], 1)], **SETTINGS)
    assert batch.input_ids.tolist() == [1, 2, 3, 4, 5, 6]
    assert batch.labels.tolist() == [2, 3, 4, 0, 6, 0]
    assert batch.loss_mask.tolist() == [0, 1, 1, 0, 1, 0]
    assert batch.cu_seqlens.tolist() == [0, 4, 6]
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.num_sequences == 2
    assert batch.pixel_values is None and batch.grids == ()
    assert batch.visual_index.numel() == batch.feature_index.numel() == 0


def test_a_sequence_is_scored_at_its_last_token_or_where_it_says() -> None:
    long, short = sequence([1, 2, 3, 4], 2), sequence([5, 6, 7], 1)
    batch = pack([long, short, short], pad_multiple=16, **SETTINGS)
    assert batch.scored.tolist() == [3, 6, 9] and batch.dropout == ()
    dropout = Dropout(3, 0.25)
    early = [replace(long, scored=1), short, replace(short, scored=0, dropout=dropout)]
    batch = pack(early, **SETTINGS)
    assert batch.scored.tolist() == [1, 6, 7]
    assert batch.dropout == (None, None, dropout)
    assert pack([], pad_to=2, **SETTINGS).scored.tolist() == []


def test_values_follow_the_predicted_token() -> None:
    batch = pack(
        [sequence([1, 2, 3], 2), sequence([4, 5], 1)], per_token=("advantages",), **SETTINGS
    )
    assert batch.per_token["advantages"].tolist() == [1.5, 2.5, 0, 1.5, 0]


def test_context_parallel_ranks_pad_every_sequence_and_the_row_makes_up_for_it() -> None:
    """Rows that are laid out equally long hold different numbers of tokens."""
    long, short = sequence([1, 2, 3, 4, 5], 2), sequence([6], 1)
    assert packed_length([long, short], 8, 4) == 16
    one, other = (
        pack(parts, pad_to=16, sequence_multiple=4, **SETTINGS) for parts in ([long, short], [long])
    )
    assert one.cu_seqlens.tolist() == [0, 5, 6, 10]
    assert other.cu_seqlens.tolist() == [0, 5, 13]
    with pytest.raises(ValueError, match="2 sequences have 12 tokens, more than pad_to=8"):
        pack([long, short], pad_to=8, sequence_multiple=4, **SETTINGS)


@pytest.mark.parametrize("multiple", [1, 2, 4])
def test_micro_batches_come_in_multiples(multiple: int) -> None:
    lengths = [9, 4, 7, 2, 8, 3, 9]
    plan = plan_micro_batches(lengths, dp_size=2, max_tokens=9, multiple=multiple)
    count = {1: 3, 2: 4, 4: 4}[multiple]
    assert [len(batches) for batches in plan] == [count, count]
    members = sorted(i for batches in plan for batch in batches for i in batch)
    assert members == list(range(7))


def test_padding_is_the_last_sequence_and_trains_nothing() -> None:
    batch = pack([sequence([1, 2, 3, 4, 5], 2)], pad_multiple=4, **SETTINGS)
    assert batch.input_ids.tolist() == [1, 2, 3, 4, 5, PAD, PAD, PAD]
    assert batch.cu_seqlens.tolist() == [0, 5, 8]
    assert batch.num_sequences == 1
    assert batch.padding_mask.tolist() == [False] * 5 + [True] * 3
    assert batch.position_ids[:, 5:].tolist() == [[0, 1, 2]] * 3
    assert batch.loss_mask.tolist() == [0, 0, 1, 1, 0, 0, 0, 0]
    assert batch.labels[5:].tolist() == [0, 0, 0]


def test_every_token_knows_its_sequences_section() -> None:
    sequences = [replace(sequence([n] * n, 1), section=n % 2) for n in (3, 2, 1)]
    batch = pack(sequences, pad_multiple=4, **SETTINGS)
    assert batch.section.tolist() == [1, 1, 1, 0, 0, 1, 0, 0]
    assert batch.section.dtype == torch.int64


def test_pad_to_gives_ranks_equal_length() -> None:
    short, long = [sequence([1, 2, 3], 1)], [sequence([1, 2, 3], 1), sequence([4, 5], 1)]
    pad_to = max(packed_length(short, 4), packed_length(long, 4))
    assert pad_to == 8
    rows = [pack(group, pad_to=pad_to, **SETTINGS) for group in (short, long)]
    assert [len(row.input_ids) for row in rows] == [8, 8]
    with pytest.raises(ValueError, match="5 tokens, more than pad_to=4"):
        pack(long, pad_to=4, **SETTINGS)


def test_no_sequences_make_a_row_of_padding() -> None:
    batch = pack([], pad_multiple=4, per_token=("advantages",), **SETTINGS)
    assert batch.input_ids.tolist() == [PAD] * 4
    assert batch.cu_seqlens.tolist() == [0, 4]
    assert batch.num_sequences == 0 and batch.padding_mask.all()
    assert batch.loss_mask.sum() == 0 and batch.labels.dtype == torch.int64
    assert batch.per_token["advantages"].tolist() == [0] * 4
    assert batch.pixel_values is None


def feature_rows(batch: PackedBatch) -> torch.Tensor:
    """First patch of each feature row: what the vision tower would make the feature from."""
    assert batch.pixel_values is not None
    return batch.pixel_values[:: MERGE**2]


def test_shared_image_is_packed_once_and_every_token_finds_its_feature() -> None:
    sequences = [
        sequence([1, A, 2, 3], 1),
        sequence([4, 5], 1),
        sequence([6, B, 7, A, 8, 9], 2),
        sequence([1, A, 2], 1),
    ]
    batch = pack(sequences, pad_multiple=8, **SETTINGS)
    assert batch.grids == ((1, 2, 6), (1, 4, 4))
    assert batch.feature_index.tolist() == [0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 0, 1, 2]
    assert torch.equal(batch.visual_index, (batch.input_ids == IMAGE).nonzero()[:, 0])
    shown = [A, B, A, A]
    want = torch.cat([picture.pixel_values[:: MERGE**2] for picture in shown])
    assert torch.equal(feature_rows(batch)[batch.feature_index], want)


def test_a_share_says_what_is_encoded_here_and_where_features_come_from() -> None:
    """B, which nothing here shows, is encoded for others; A comes from a rank after CLIP's."""
    exchange = FeatureExchange(torch.arange(4), (0, 4), (4, 3))
    share = ImageShare((B,), {CLIP.key: 0, A.key: 4}, exchange)
    batch = pack([clip_sequence(CLIP, [2, 2], True), sequence([5, 6], 1)], images=share, **SETTINGS)
    assert batch.pixel_values is not None and torch.equal(batch.pixel_values, B.pixel_values)
    assert batch.grids == (B.grid_thw,)
    assert batch.feature_index.tolist() == [4, 5, 6, 0, 1, 2, 3]
    assert batch.exchange is exchange


def clip_sequence(clip: VisualInputs, frames: list[int], picture_first: bool) -> Sequence:
    """A clip whose frames have as many tokens as listed, after or before picture A."""
    shown = [token for count in frames for token in (3, *[VIDEO] * count)]
    picture = [IMAGE] * 3
    tokens = torch.tensor([*picture, 1, *shown] if picture_first else [*shown, *picture])
    return Sequence(tokens, (A,), tokens == 3, {}, (clip,))


CLIP = VisualInputs("clip", torch.randn(2 * 4 * 2, PATCH_VALUES), (2, 4, 2))


def test_features_come_in_the_order_of_the_tokens_that_show_them() -> None:
    """Two frames of two tokens with a timestamp before each, and an image of three tokens."""
    rows = [clip_sequence(CLIP, [2, 2], False), clip_sequence(CLIP, [2, 2], True)]
    batch = pack(rows, **SETTINGS)
    assert batch.grids == (A.grid_thw, CLIP.grid_thw)
    assert batch.visual_index.tolist() == [1, 2, 4, 5, 6, 7, 8, 9, 10, 11, 14, 15, 17, 18]
    assert batch.feature_index.tolist() == [3, 4, 5, 6, 0, 1, 2, 0, 1, 2, 3, 4, 5, 6]
    want = torch.cat([v.pixel_values[:: MERGE**2] for v in (CLIP, A, A, CLIP)])
    assert torch.equal(feature_rows(batch)[batch.feature_index], want)


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        ([2], "1 of 2 grids have no placeholders 51"),
        ([1, 3], r"grid \(1, 4, 2\) needs 2 placeholders 51 at index 1"),
        ([2, 2, 2], "all 2 grids are used up"),
    ],
)
def test_frames_and_placeholders_must_match(frames: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack([clip_sequence(CLIP, frames, False)], **SETTINGS)


def test_positions_start_anew_in_each_sequence() -> None:
    sequences = [sequence([1, A, 2], 1), sequence([3, 4, 5], 1), sequence([B, 6, 7], 1)]
    batch = pack(sequences, **SETTINGS)
    for number, one in enumerate(sequences):
        start, end = batch.cu_seqlens[number], batch.cu_seqlens[number + 1]
        alone = mrope_positions(
            one.input_ids,
            [picture.grid_thw for picture in one.images],
            [],
            **TOKENS,
        )
        assert torch.equal(batch.position_ids[:, start:end], alone)


def test_positions_without_mrope_count_every_token() -> None:
    batch = pack([sequence([1, A, 2], 1), sequence([B, 6], 1)], **SETTINGS, mrope=False)
    counted = [*range(1 + 3 + 1), *range(4 + 1)]
    assert batch.position_ids.tolist() == [counted] * 3


def test_noise_goes_with_its_sequence() -> None:
    plain, noisy = sequence([1, 2], 1), replace(sequence([3, 4], 1), noise=Noise(5, 0.1))
    assert pack([plain, noisy], **SETTINGS, pad_to=9).noise == (None, Noise(5, 0.1))
    assert pack([plain, plain], **SETTINGS).noise == ()


def test_a_sequence_without_a_wanted_value_fails() -> None:
    with pytest.raises(KeyError, match="old_logprobs"):
        pack([sequence([1, 2], 1)], per_token=("old_logprobs",), **SETTINGS)


@pytest.mark.parametrize("dp_size", [1, 2, 3])
@pytest.mark.parametrize("max_tokens", [100, 161, 1000])
def test_plan_holds_every_sequence_once_within_the_limit(dp_size: int, max_tokens: int) -> None:
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(5, 100, (37,), generator=generator).tolist()
    plan = plan_micro_batches(lengths, dp_size=dp_size, max_tokens=max_tokens)
    assert len(plan) == dp_size
    assert len({len(micro_batches) for micro_batches in plan}) == 1
    groups = [group for micro_batches in plan for group in micro_batches]
    assert sorted(index for group in groups for index in group) == list(range(37))
    assert all(sum(lengths[i] for i in group) <= max_tokens for group in groups)
    assert plan == plan_micro_batches(lengths, dp_size=dp_size, max_tokens=max_tokens)


def test_plan_balances_ranks_within_each_micro_batch() -> None:
    lengths = [90, 10, 50, 50, 80, 20, 60, 40]
    plan = plan_micro_batches(lengths, dp_size=2, max_tokens=110)
    loads = [[sum(lengths[i] for i in group) for group in rank] for rank in plan]
    assert loads == [[100, 100], [100, 100]]


def test_plan_uses_no_more_micro_batches_than_needed() -> None:
    assert plan_micro_batches([10] * 8, dp_size=2, max_tokens=40) == [
        [[0, 2, 4, 6]],
        [[1, 3, 5, 7]],
    ]
    assert plan_micro_batches([40], dp_size=1, max_tokens=40) == [[[0]]]


def test_plan_grows_when_the_total_fits_but_the_pieces_do_not() -> None:
    plan = plan_micro_batches([60, 60, 60], dp_size=1, max_tokens=100)
    assert sorted(plan[0]) == [[0], [1], [2]]


def test_fewer_sequences_than_ranks_leave_some_without() -> None:
    plan = plan_micro_batches([7, 5], dp_size=4, max_tokens=100)
    assert sorted(plan) == [[[]], [[]], [[0]], [[1]]]


def test_plan_names_the_sequence_that_is_too_long() -> None:
    with pytest.raises(ValueError, match=r"sequence 2 has 101 tokens.*micro_batch_tokens=100"):
        plan_micro_batches([5, 100, 101], dp_size=2, max_tokens=100)


def test_plan_balances_costs_where_tokens_do_not_tell_them() -> None:
    """Attention makes the one long sequence cost more than the short ones with as many tokens."""
    lengths = [80, *[10] * 10]
    costs = [length * (100 + length) for length in lengths]
    by_tokens = plan_micro_batches(lengths, dp_size=2, max_tokens=110)
    by_cost = plan_micro_batches(lengths, dp_size=2, max_tokens=110, costs=costs)

    def spread(plan: list[list[list[int]]]) -> int:
        loads = [sum(costs[i] for i in rank[0]) for rank in plan]
        return max(loads) - min(loads)

    assert [len(rank) for rank in by_cost] == [len(rank) for rank in by_tokens] == [1, 1]
    assert sorted(i for rank in by_cost for i in rank[0]) == list(range(11))
    assert spread(by_cost) == 3400 and spread(by_tokens) == 5600
    assert by_cost[0][0] == [0] and len(by_cost[1][0]) == 10


def test_plan_by_cost_holds_the_limit_where_the_cheapest_is_full() -> None:
    """The last sequence has no room in the cheapest micro-batch, and goes to the other one."""
    plan = plan_micro_batches([60, 50, 40, 30], dp_size=2, max_tokens=100, costs=[1, 2, 30, 40])
    assert sorted(plan) == [[[0, 3]], [[1, 2]]]


def test_plan_by_lengths_is_the_plan_without_costs() -> None:
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(5, 100, (53,), generator=generator).tolist()
    for dp_size, max_tokens in ((1, 120), (3, 200), (4, 1000)):
        options = {"dp_size": dp_size, "max_tokens": max_tokens}
        assert plan_micro_batches(lengths, **options) == plan_micro_batches(
            lengths, costs=lengths, **options
        )


def test_padding_takes_as_many_experts_as_a_token() -> None:
    """3 layers, 2 of 5 experts; fused kernels take one twice where fewer are allowed."""
    short, longer = sequence([1, 2, 3], 1), sequence([4, 5, 6, 7], 2)
    generator = torch.Generator().manual_seed(4)
    routed = [
        replace(s, routes=torch.rand(len(s), 3, 5, generator=generator).topk(2).indices.byte())
        for s in (short, longer)
    ]
    batch = pack(routed, **SETTINGS, pad_to=10)
    assert batch.routes is not None and batch.routes.shape == (10, 3, 2)
    assert torch.equal(
        batch.routes[:7], torch.cat([s.routes for s in routed if s.routes is not None])
    )
    assert (batch.routes.sort(-1).values.diff() > 0).all()
    assert pack([short, longer], **SETTINGS, pad_to=10).routes is None
