"""Group-relative advantages against numbers worked out by hand and plain formulas."""

from __future__ import annotations

import statistics
from typing import Any

import pytest
import torch
from torch import Tensor

from prism_megatron.config.schema import Advantage
from prism_megatron.objectives.advantages import (
    alignment_advantage,
    group_normalise,
    overlong_penalty,
)

DEFAULT = Advantage()


def align(
    perception: list[float],
    reasoning: list[float],
    groups: list[int],
    valid: list[bool],
    accuracy: list[float] | None = None,
    **options: Any,
) -> Tensor:
    return alignment_advantage(
        [(0.5, torch.tensor(perception)), (0.5, torch.tensor(reasoning))],
        torch.tensor(groups),
        torch.tensor(valid),
        options=Advantage(**options),
        accuracy=None if accuracy is None else torch.tensor(accuracy),
    )


def close(actual: Tensor, expected: list[float]) -> None:
    torch.testing.assert_close(actual, torch.tensor(expected).float(), atol=1e-5, rtol=0)


def test_hand_computed_group() -> None:
    # mean 1/4, unbiased variance (9 + 3) / 16 / 3 = 1/4
    close(
        group_normalise(torch.tensor([1.0, 0, 0, 0]), torch.zeros(4).long()),
        [1.5, -0.5] + [-0.5] * 2,
    )


def test_docstring_example_and_lone_member() -> None:
    advantage = group_normalise(torch.tensor([1.0, 0, 0, 5]), torch.tensor([7, 7, 7, 9]))
    close(advantage, [1.154699, -0.577350, -0.577350, 0])


def test_interleaved_groups_equal_the_plain_formula() -> None:
    generator = torch.Generator().manual_seed(3)
    scores = torch.randn(23, generator=generator)
    groups = torch.randint(-2, 3, (23,), generator=generator) * 1000
    actual = group_normalise(scores, groups)
    for group in groups.unique():
        values = scores[groups == group].tolist()
        mean, std = statistics.mean(values), statistics.stdev(values)
        close(actual[groups == group], [(value - mean) / (std + 1e-6) for value in values])


@pytest.mark.parametrize("value", [0.0, 0.1, -1e6 / 3])
def test_equal_scores_give_exactly_zero(value: float) -> None:
    advantage = group_normalise(torch.full((7,), value), torch.zeros(7).long())
    assert advantage.tolist() == [0.0] * 7


def test_scale_and_shift_of_scores_do_not_matter() -> None:
    scores, groups = torch.tensor([0.3, -1.2, 0.9, 2.0, 0.1]), torch.tensor([0, 0, 0, 1, 1])
    torch.testing.assert_close(
        group_normalise(scores, groups), group_normalise(40 * scores - 9, groups), atol=1e-4, rtol=0
    )


def test_invalid_scores_are_not_read() -> None:
    groups, valid = torch.zeros(4).long(), torch.tensor([True, True, False, True])
    with_nan = torch.tensor([2.0, 0, torch.nan, 1])
    close(group_normalise(with_nan, groups, valid), [1, -1, 0, 0])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_scores_that_are_not_finite_are_an_error(bad: float) -> None:
    with pytest.raises(ValueError, match=r"1 of 3 scores are not finite \(responses \[1\]\)"):
        group_normalise(torch.tensor([0.0, bad, 1.0]), torch.zeros(3).long())


def test_empty_batch() -> None:
    empty = torch.zeros(0)
    assert group_normalise(empty, empty.long()).shape == (0,)


def test_alignment_docstring_example() -> None:
    nan = torch.nan
    actual = align([2, 0, nan, 1], [0, 0, nan, 0], [5, 5, 5, 5], [True, True, False, True])
    close(actual, [0.875, -0.125, -1.125, 0.375])


def test_streams_weigh_alike_whatever_their_scale() -> None:
    actual = align([0, 1], [300, 0], [0, 0], [True, True])
    close(actual, [0, 0])


def test_stream_weights() -> None:
    streams = [(0.9, torch.tensor([1.0, -1.0])), (0.2, torch.tensor([-2.0, 2.0]))]
    groups, valid = torch.tensor([4, 4]), torch.tensor([True, True])
    actual = alignment_advantage(streams, groups, valid, options=DEFAULT)
    close(actual, [0.7 / 2**0.5, -0.7 / 2**0.5])


def test_a_single_stream_is_grpo_on_its_scores() -> None:
    scores, groups = torch.tensor([0.3, -1.2, 0.9, 2.0]), torch.tensor([0, 0, 0, 0])
    valid = torch.ones(4, dtype=torch.bool)
    actual = alignment_advantage([(1.0, scores)], groups, valid, options=DEFAULT)
    torch.testing.assert_close(actual, group_normalise(scores, groups))


def test_valid_group_is_the_mean_of_both_normalised_streams() -> None:
    perception, reasoning = [0.1, 0.5, -0.3, 0.2], [1.0, -2.0, 0.5, 0.0]
    groups = torch.zeros(4).long()
    expected = 0.5 * group_normalise(torch.tensor(perception), groups)
    expected += 0.5 * group_normalise(torch.tensor(reasoning), groups)
    torch.testing.assert_close(align(perception, reasoning, [0] * 4, [True] * 4), expected)


@pytest.mark.parametrize("invalid", [1, 4, 15])
def test_invalid_responses_leave_the_spread_of_the_others_alone(invalid: int) -> None:
    """The reference's lowest-score-less-one takes it away: 0.78 falls to 0.23 with one of 16."""
    generator = torch.Generator().manual_seed(invalid)
    scores = 0.1 * torch.randn(16, generator=generator)
    valid = torch.arange(16) >= invalid
    actual = align(scores.tolist(), (-2 * scores**2).tolist(), [0] * 16, valid.tolist())
    alone = align(
        scores[valid].tolist(),
        (-2 * scores[valid] ** 2).tolist(),
        [0] * (16 - invalid),
        [True] * (16 - invalid),
    )
    torch.testing.assert_close(actual[valid] - actual[valid].mean(), alone, atol=1e-5, rtol=0)
    close(actual[~valid], [-1.5 * (16 - invalid) / 16] * invalid)


def test_invalid_lies_one_penalty_below_the_mean_valid_response() -> None:
    actual = align([0.3, -4, 2, 0, 0], [1, 5, 0, 0, 0], [0] * 5, [True] * 3 + [False] * 2)
    assert (actual[:3].mean() - actual[3]).item() == pytest.approx(1.5, abs=1e-5)
    assert actual[3] == actual[4]


def test_every_group_sums_to_zero() -> None:
    generator = torch.Generator().manual_seed(11)
    groups = torch.randint(0, 5, (64,), generator=generator)
    valid = torch.rand(64, generator=generator) > 0.4
    perception, reasoning = torch.randn(2, 64, generator=generator)
    actual = align(perception.tolist(), reasoning.tolist(), groups.tolist(), valid.tolist())
    sums = torch.zeros(5).index_add(0, groups, actual)
    torch.testing.assert_close(sums, torch.zeros(5), atol=1e-5, rtol=0)
    assert actual[~valid].min() >= -1.5 and actual[~valid].max() <= 0


def test_group_without_a_valid_response_teaches_nothing() -> None:
    actual = align([torch.nan] * 3 + [1, 0], [0] * 5, [0, 0, 0, 1, 1], [False] * 3 + [True] * 2)
    assert actual[:3].tolist() == [0, 0, 0]
    assert actual[3] > 0 > actual[4]


def test_groups_do_not_influence_each_other() -> None:
    both = align([1, 2, 5, 0, 9], [0, 1, 3, 3, 0], [1, 0, 1, 0, 0], [True, True, True, True, False])
    first = align([1, 5], [0, 3], [1, 1], [True, True])
    torch.testing.assert_close(both[[0, 2]], first)


def test_without_std_it_is_the_distance_to_the_mean() -> None:
    scores, groups = torch.tensor([1.0, 0, 0, 5, 3]), torch.tensor([7, 7, 7, 9, 9])
    actual = group_normalise(scores, groups, by_std=False)
    close(actual, [2 / 3, -1 / 3, -1 / 3, 1, -1])


# What was seen of the reference's function (grpo_multi_reward), 16 responses, weights 0.5, penalty
# 1.5: by the number of invalid ones and the deviation of the valid scores.
REFERENCE: dict[str, Any] = {"invalid_samples": "reference"}


def reference_like(invalid: int, std: float, **options: Any) -> tuple[Tensor, Tensor]:
    """Advantages of 16 responses whose valid scores have that deviation and both streams agree on,
    and which of them are valid."""
    generator = torch.Generator().manual_seed(2)
    scores = torch.randn(16, generator=generator)
    valid = torch.arange(16) >= invalid
    if valid.sum() > 1:
        scores = std * (scores - scores[valid].mean()) / scores[valid].std()
    found = align(scores.tolist(), scores.tolist(), [0] * 16, valid.tolist(), **options)
    return found, valid


def test_reference_without_invalid_responses_is_centred() -> None:
    found, _ = reference_like(0, 0.1, **REFERENCE)
    assert found.mean().abs() < 1e-6
    torch.testing.assert_close(found, reference_like(0, 0.1)[0])


@pytest.mark.parametrize(("std", "penalised"), [(0.1, -5.0), (1.0, -3.9)])
def test_reference_punishes_an_invalid_response_twice(std: float, penalised: float) -> None:
    found, valid = reference_like(1, std, **REFERENCE)
    assert found[0].item() == pytest.approx(penalised, abs=0.6)
    assert found[~valid].min() < -3  # more than the corrected penalty allows
    if std == 0.1:
        assert found[valid].std() < 0.4 < 0.9 < reference_like(1, std)[0][valid].std()


def test_reference_groups_do_not_sum_to_zero() -> None:
    found, _ = reference_like(4, 1.0, **REFERENCE)
    assert found.mean().item() == pytest.approx(-0.375, abs=1e-5)
    assert reference_like(4, 1.0)[0].mean().abs() < 1e-6


def test_reference_lone_valid_response() -> None:
    found, _ = reference_like(15, 1.0, **REFERENCE)
    assert found.tolist() == pytest.approx([-0.25 - 1.5] * 15 + [3.75], abs=1e-4)


def test_reference_group_without_a_valid_response_is_pushed_down() -> None:
    found, _ = reference_like(16, 1.0, **REFERENCE)
    close(found, [-1.5] * 16)


def test_reference_hands_out_the_raw_score_of_a_lone_response() -> None:
    found = align([3.0, 1.0], [5.0, 1.0], [0, 1], [True, False], **REFERENCE)
    close(found, [4.0, -1 - 1.5])


def test_combine_then_normalise_lets_the_wider_stream_rule() -> None:
    perception, reasoning = [0.0, 1.0, 0.5], [30.0, 0.0, 0.0]
    found = align(
        perception, reasoning, [0] * 3, [True] * 3, stream_combination="combine_then_normalise"
    )
    total = torch.tensor([15.0, 0.5, 0.25])
    torch.testing.assert_close(found, group_normalise(total, torch.zeros(3).long()))
    assert found[0] > 1 > align(perception, reasoning, [0] * 3, [True] * 3)[0]


def test_combine_then_normalise_does_not_read_invalid_scores() -> None:
    nan = torch.nan
    options: dict[str, Any] = {"stream_combination": "combine_then_normalise"}
    found = align([2, nan, 0], [4, nan, 0], [0] * 3, [True, False, True], **options)
    spread = 1 / 2**0.5
    close(found, [spread + 0.5, -1.0, -spread + 0.5])
    found = align([2, nan, 0], [4, nan, 0], [0] * 3, [True, False, True], **options, **REFERENCE)
    # 3, 0 - 1, 0: mean 2/3, deviation sqrt(13 / 3)
    std = (13 / 3) ** 0.5
    close(found, [7 / 3 / std, -5 / 3 / std - 1.5, -2 / 3 / std])


# Right, wrong, invalid, right; both streams' GN are [1, -1, 0, 0] over the valid ones.
MODES: dict[str, list[float]] = {
    # penalties p_w=0.5 and p_f=1.5: costs [0, 0.5, 1.5, 0], mean 0.5; c=2
    "acc_gating": [2 + 0.5, -2 + 0, -1, 0.5],
    # the wrong one is gated
    "gated_align": [2 + 0.5, 0, -1, 0.5],
}


@pytest.mark.parametrize("mode", MODES)
def test_gated_modes_by_hand(mode: Any) -> None:
    scores, valid = [2.0, 0.0, torch.nan, 1.0], [True, True, False, True]
    found = align(
        scores, scores, [0] * 4, valid, [1.0, 0.0, 1.0, 1.0], advantage_mode=mode,
        wrong_penalty=0.5, align_coef=2.0,
    )  # fmt: skip
    close(found, MODES[mode])


@pytest.mark.parametrize(
    ("mode", "rewards", "aligned"),
    [
        # w_a=0.8, w_f=0.2, p_w=0.5, p_f=1.5, c=2
        ("rlvr", [1.0, 0.2, 0.0, 1.0], [2.0, 0, 0, 0]),
        ("rlvr_v2", [1.0, -0.3, -1.5, 1.0], [2.0, 0, 0, 0]),
        ("sign_align", [1.0, -0.3, -1.5, 1.0], [2.0, 2.0, 0, 0]),
    ],
)
def test_rewarded_modes_by_hand(mode: Any, rewards: list[float], aligned: list[float]) -> None:
    scores, valid = [2.0, 0.0, torch.nan, 1.0], [True, True, False, True]
    found = align(
        scores, scores, [0] * 4, valid, [1.0, 0.0, 1.0, 1.0], advantage_mode=mode,
        wrong_penalty=0.5, align_coef=2.0, accuracy_weight=0.8, format_weight=0.2,
    )  # fmt: skip
    wanted = group_normalise(torch.tensor(rewards), torch.zeros(4).long()) + torch.tensor(aligned)
    torch.testing.assert_close(found, wanted)


def test_reference_gated_align_does_not_know_the_wrong_ones() -> None:
    scores, valid = [2.0, 0.0, torch.nan, 1.0], [True, True, False, True]
    options: dict[str, Any] = {"advantage_mode": "gated_align", "invalid_samples": "corrected"}
    found = align(
        scores, scores, [0] * 4, valid, [1.0, 0.0, 0.0, 1.0], gated_align_accuracy="reference",
        **options,
    )  # fmt: skip
    close(found, align(scores, scores, [0] * 4, valid).tolist())


def test_reference_penalties_are_not_centred() -> None:
    scores, valid = [2.0, 0.0, 1.0], [True] * 3
    options: dict[str, Any] = {"advantage_mode": "acc_gating", "wrong_penalty": 0.75}
    found = align(scores, scores, [0] * 3, valid, [1.0, 0.0, 1.0], **options, **REFERENCE)
    close(found, [1, -1.75, 0])
    found = align(scores, scores, [0] * 3, valid, [1.0, 0.0, 1.0], **options)
    close(found, [1.25, -1.5, 0.25])


def test_overlong_docstring_example() -> None:
    found = overlong_penalty(torch.tensor([1, 6, 7, 10]), 10, 4, 1.0)
    close(found, [0, 0, -0.25, -1])
    close(overlong_penalty(torch.tensor([8]), 10, 4, 3.0), [-1.5])
