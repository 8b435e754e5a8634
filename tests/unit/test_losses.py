"""Losses against plain formulas, their gradients, and their independence of the split."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from prism_megatron.objectives.losses import (
    aggregation,
    bound_scores,
    bradley_terry_loss,
    fallback_loss,
    importance_weights,
    kl_penalty,
    local_pair_weights,
    policy_loss,
    score_regulariser,
    sft_loss,
    weighted_sum,
)

CLIP = {"clip_low": 0.2, "clip_high": 0.3}


def batch(tokens: int = 37) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    logprobs = -3 * torch.rand(tokens, generator=generator)
    return {
        "logprobs": logprobs,
        "old_logprobs": logprobs + 0.4 * torch.randn(tokens, generator=generator),
        "advantages": torch.randn(tokens, generator=generator),
        "mask": (torch.rand(tokens, generator=generator) > 0.3).float(),
    }


def policy_token_loss(new: float, old: float, advantage: float, dual: float | None) -> float:
    """One token's loss, written as in the papers."""
    ratio = math.exp(new - old)
    gain = min(ratio * advantage, min(max(ratio, 0.8), 1.3) * advantage)
    if dual is not None and advantage < 0:
        gain = max(gain, dual * advantage)
    return -gain


def split_gradients(loss_of: Callable[[slice], Tensor], leaf: Tensor, cuts: list[int]) -> Tensor:
    leaf.grad = None
    for start, stop in pairwise(cuts):
        loss_of(slice(start, stop)).backward()
    assert leaf.grad is not None
    return leaf.grad.clone()


def test_sft_loss_by_hand() -> None:
    logprobs = torch.tensor([-1.0, -2.0, -4.0, -8.0])
    assert sft_loss(logprobs, torch.tensor([1.0, 0, 1, 0]), num_tokens=10).item() == 0.5


def test_sft_loss_is_cross_entropy() -> None:
    logits = torch.randn(11, 7, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(11) % 7
    logprobs = logits.log_softmax(-1).gather(1, labels[:, None]).squeeze(1)
    expected = torch.nn.functional.cross_entropy(logits, labels)
    torch.testing.assert_close(sft_loss(logprobs, torch.ones(11), 11), expected)


def test_sft_loss_ignores_what_the_mask_leaves_out() -> None:
    logprobs = torch.tensor([-1.0, -torch.inf, torch.nan], requires_grad=True)
    loss = sft_loss(logprobs, torch.tensor([1.0, 0, 0]), num_tokens=1)
    loss.backward()
    assert loss.item() == 1
    assert logprobs.grad is not None and logprobs.grad.tolist() == [-1, 0, 0]


@pytest.mark.parametrize("cuts", [[0, 37], [0, 1, 37], [0, 9, 9, 30, 37]])
def test_sft_gradient_does_not_depend_on_the_split(cuts: list[int]) -> None:
    data = batch()
    leaf = data["logprobs"].requires_grad_()
    count = int(data["mask"].sum())
    gradient = split_gradients(
        lambda part: sft_loss(leaf[part], data["mask"][part], count), leaf, cuts
    )
    torch.testing.assert_close(gradient, -data["mask"] / count)


@pytest.mark.parametrize("dual", [None, 1.4])
def test_policy_loss_equals_the_plain_formula(dual: float | None) -> None:
    data = batch()
    loss, _ = policy_loss(**data, **CLIP, denominator=50, dual_clip=dual)
    rows = zip(*(data[name].tolist() for name in data), strict=True)
    expected = sum(policy_token_loss(n, o, a, dual) for n, o, a, masked in rows if masked) / 50
    assert loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("dual", [None, 1.4])
def test_policy_gradient_equals_finite_differences(dual: float | None) -> None:
    data = batch()
    leaf = data["logprobs"].requires_grad_()
    loss, _ = policy_loss(**data, **CLIP, denominator=50, dual_clip=dual)
    loss.backward()
    assert leaf.grad is not None
    names = ("logprobs", "old_logprobs", "advantages", "mask")
    for index, (new, old, advantage, masked) in enumerate(
        zip(*(data[name].tolist() for name in names), strict=True)
    ):
        step = 1e-5
        above = policy_token_loss(new + step, old, advantage, dual)
        below = policy_token_loss(new - step, old, advantage, dual)
        expected = masked * (above - below) / (2 * step) / 50
        assert leaf.grad[index].item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "bound"),
    [
        (1.0, 2.0, -2.0, -2.0, None),
        (1.1, -1.0, 1.1, 1.1, None),
        (1.5, 2.0, -2.6, 0.0, "clipped_high"),
        (0.5, 2.0, -1.0, -1.0, None),  # a good token that fell is pulled back
        (0.5, -2.0, 1.6, 0.0, "clipped_low"),
        (1.5, -2.0, 3.0, 3.0, None),
        (5.0, -2.0, 6.0, 0.0, "clipped_dual"),
    ],
)
def test_each_side_of_each_bound(
    ratio: float, advantage: float, loss: float, gradient: float, bound: str | None
) -> None:
    logprob = torch.tensor([math.log(ratio) - 1], requires_grad=True)
    value, metrics = policy_loss(
        logprob,
        torch.tensor([-1.0]),
        torch.tensor([advantage]),
        torch.ones(1),
        **CLIP,
        denominator=1,
        dual_clip=3.0,
    )
    value.backward()
    assert logprob.grad is not None
    assert value.item() == pytest.approx(loss, rel=1e-5)
    assert logprob.grad.item() == pytest.approx(gradient, rel=1e-5)
    bounds = ("clipped_high", "clipped_low", "clipped_dual")
    assert [name for name in bounds if metrics[name]] == ([bound] if bound else [])


def test_on_policy_gradient_is_reinforce() -> None:
    data = batch()
    leaf = data["logprobs"].requires_grad_()
    data["old_logprobs"] = leaf.detach()
    loss, metrics = policy_loss(**data, **CLIP, denominator=20)
    loss.backward()
    torch.testing.assert_close(leaf.grad, -data["advantages"] * data["mask"] / 20)
    assert metrics["ratio"] == metrics["tokens"] == data["mask"].sum()
    assert metrics["approx_kl"] == 0


def test_policy_metrics_are_sums_over_the_mask() -> None:
    data = batch()
    _, metrics = policy_loss(**data, **CLIP, denominator=1000)
    mask = data["mask"].bool()
    log_ratio = (data["logprobs"] - data["old_logprobs"])[mask]
    torch.testing.assert_close(metrics["tokens"], mask.sum().float())
    torch.testing.assert_close(metrics["ratio"], log_ratio.exp().sum())
    torch.testing.assert_close(metrics["approx_kl"], (log_ratio.exp() - 1 - log_ratio).sum())
    assert metrics["clipped_dual"] == 0


@pytest.mark.parametrize("cuts", [[0, 37], [0, 20, 37], [0, 1, 2, 36, 37]])
def test_policy_gradient_and_metrics_do_not_depend_on_the_split(cuts: list[int]) -> None:
    data = batch()
    leaf = data["logprobs"].requires_grad_()
    count = int(data["mask"].sum())
    totals: dict[str, Tensor] = {}

    def loss_of(part: slice) -> Tensor:
        arguments = {name: values[part] for name, values in data.items()}
        loss, metrics = policy_loss(**arguments, **CLIP, denominator=count)
        for name, value in metrics.items():
            totals[name] = totals.get(name, torch.zeros(())) + value
        return loss

    gradient = split_gradients(loss_of, leaf, cuts)
    leaf.grad = None
    loss, metrics = policy_loss(**data, **CLIP, denominator=count)
    loss.backward()
    torch.testing.assert_close(gradient, leaf.grad)
    for name, value in metrics.items():
        torch.testing.assert_close(totals[name], value)


def test_policy_loss_ignores_what_the_mask_leaves_out() -> None:
    """Padding may hold anything; exp of it must not reach the gradient."""
    logprobs = torch.tensor([-1.0, -0.5, -2.0], requires_grad=True)
    loss, metrics = policy_loss(
        logprobs,
        torch.tensor([-1.0, -500.0, -torch.inf]),
        torch.tensor([1.0, -1.0, torch.nan]),
        torch.tensor([1.0, 0, 0]),
        **CLIP,
        denominator=1,
    )
    loss.backward()
    assert logprobs.grad is not None and logprobs.grad.tolist() == [-1, 0, 0]
    assert metrics["tokens"] == metrics["ratio"] == 1


def test_dual_clip_must_lie_above_one() -> None:
    with pytest.raises(ValueError, match="dual_clip=1.0"):
        policy_loss(**batch(), **CLIP, denominator=1, dual_clip=1.0)


def test_bradley_terry_by_hand() -> None:
    teacher, student = torch.tensor([2.0, 0.0, -1.0]), torch.tensor([0.0, 0.0, 2.0])
    loss, metrics = bradley_terry_loss(teacher, student, num_pairs=4)
    expected = (math.log1p(math.exp(-2)) + math.log(2) + math.log1p(math.exp(3))) / 4
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert {name: value.item() for name, value in metrics.items()} == {
        "pairs": 3,
        "correct": 1,  # a tie is not correct
        "gap": -1,
    }


def test_bradley_terry_gradient_is_the_probability_of_being_wrong() -> None:
    teacher = torch.tensor([0.5, -3.0, 40.0], requires_grad=True)
    student = torch.tensor([1.5, 30.0, -40.0], requires_grad=True)
    bradley_terry_loss(teacher, student, num_pairs=3)[0].backward()
    wrong = torch.sigmoid(student.detach() - teacher.detach()) / 3
    torch.testing.assert_close(teacher.grad, -wrong)
    torch.testing.assert_close(student.grad, wrong)
    assert wrong[1] > 0.33  # the reference's clamp would have stopped this one


def test_bradley_terry_does_not_depend_on_the_split() -> None:
    generator = torch.Generator().manual_seed(2)
    teacher, student = torch.randn(2, 13, generator=generator)
    whole, metrics = bradley_terry_loss(teacher, student, 13)
    parts = [slice(0, 0), slice(0, 1), slice(1, 8), slice(8, 13)]
    split = [bradley_terry_loss(teacher[part], student[part], 13) for part in parts]
    torch.testing.assert_close(sum(loss for loss, _ in split), whole)
    for name, value in metrics.items():
        torch.testing.assert_close(sum(part[name] for _, part in split), value)


def test_micro_batch_without_pairs_has_zero_gradient() -> None:
    scores = torch.zeros(0, requires_grad=True)
    loss, metrics = bradley_terry_loss(scores, scores, num_pairs=3)
    (loss + score_regulariser(scores, 12)).backward()
    assert loss.item() == 0 and metrics["pairs"] == 0
    assert scores.grad is not None


def test_scores_are_compared_in_fp32() -> None:
    teacher, student = torch.tensor([9.0], dtype=torch.bfloat16), torch.tensor([9.02])
    assert bradley_terry_loss(teacher, student, 1)[1]["gap"].item() == pytest.approx(
        -0.02, abs=1e-5
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_are_an_error(bad: float) -> None:
    fine, broken = torch.zeros(2), torch.tensor([0.0, bad])
    with pytest.raises(ValueError, match="1 of 2 teacher scores"):
        bradley_terry_loss(broken, fine, 2)
    with pytest.raises(ValueError, match="1 of 2 student scores"):
        bradley_terry_loss(fine, broken, 2)
    with pytest.raises(ValueError, match="not finite"):
        score_regulariser(broken, 2)


def test_score_regulariser_pulls_towards_zero() -> None:
    scores = torch.tensor([3.0, -1.0], requires_grad=True)
    loss = score_regulariser(scores, count=4)
    loss.backward()
    assert loss.item() == 2.5
    assert scores.grad is not None and scores.grad.tolist() == [1.5, -0.5]


@pytest.mark.parametrize("count", [0, -3])
def test_empty_step_is_an_error(count: int) -> None:
    ones = torch.ones(2)
    with pytest.raises(ValueError, match=f"num_tokens={count}"):
        sft_loss(ones, ones, count)
    with pytest.raises(ValueError, match=f"denominator={count}"):
        policy_loss(ones, ones, ones, ones, **CLIP, denominator=count)
    with pytest.raises(ValueError, match=f"num_pairs={count}"):
        bradley_terry_loss(ones, ones, count)
    with pytest.raises(ValueError, match=f"count={count}"):
        score_regulariser(ones, count)


def test_gspo_by_hand() -> None:
    """Two sequences: log ratios (0.3, 0.1) and (-0.4), masked tokens between."""
    new = torch.tensor([-1.0, -9.0, -2.0, -3.0, -9.0], requires_grad=True)
    old = torch.tensor([-1.3, 5.0, -2.1, -2.6, 7.0])
    advantages = torch.tensor([2.0, 3.0, 2.0, -1.0, 3.0])
    mask, segments = torch.tensor([1.0, 0, 1, 1, 0]), torch.tensor([0, 0, 0, 1, 1])
    loss, metrics = policy_loss(
        new, old, advantages, mask, clip_low=0.1, clip_high=0.25, denominator=2.0,
        loss_mode="gspo", segments=segments, weights=torch.tensor([0.5, 9, 0.5, 1, 9]),
    )  # fmt: skip
    first, second = math.exp(0.2), math.exp(-0.4)
    # the second is below 1 - clip_low with a negative advantage: its value is the bound's
    assert loss.item() == pytest.approx(-(2 * first - 0.9) / 2, rel=1e-5)
    loss.backward()
    assert new.grad is not None
    wanted = [-0.5 * 2 * first / 2, 0, -0.5 * 2 * first / 2, 0, 0]
    assert new.grad.tolist() == pytest.approx(wanted, rel=1e-5)
    assert metrics["ratio"].item() == pytest.approx(2 * first + second, rel=1e-5)
    assert (metrics["clipped_low"], metrics["clipped_high"]) == (1, 0)


def test_gspo_of_one_token_sequences_is_the_clipped_ratio() -> None:
    data, segments = batch(), torch.arange(37)
    leaf = data["logprobs"].requires_grad_()
    gradients = []
    for options in ({"loss_mode": "gspo", "segments": segments}, {}):
        leaf.grad = None
        policy_loss(**data, **CLIP, **options, denominator=9)[0].backward()
        assert leaf.grad is not None
        gradients.append(leaf.grad.clone())
    torch.testing.assert_close(*gradients)


def test_cispo_by_hand() -> None:
    """Ratios 2, 0.1 and 1.1, bounded to [0.5, 1.3] whatever the advantage's sign."""
    ratios = [2.0, 0.1, 1.1]
    new = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    old = torch.tensor([value - math.log(r) for value, r in zip(new.tolist(), ratios, strict=True)])
    advantages = torch.tensor([-1.0, 2.0, 3.0])
    loss, metrics = policy_loss(
        new, old, advantages, torch.ones(3), clip_low=0.5, clip_high=0.3, denominator=4,
        loss_mode="cispo",
    )  # fmt: skip
    loss.backward()
    assert new.grad is not None
    weights = [1.3 * -1, 0.5 * 2, 1.1 * 3]
    assert new.grad.tolist() == pytest.approx([-w / 4 for w in weights], rel=1e-5)
    assert loss.item() == pytest.approx((1.3 * -1 + 0.5 * 2 * 2 + 1.1 * 3 * 3) / 4, rel=1e-5)
    assert (metrics["clipped_high"], metrics["clipped_low"]) == (1, 1)


@pytest.mark.parametrize("mode", ["vanilla", "gspo", "cispo"])
def test_every_mode_is_reinforce_on_policy(mode: Any) -> None:
    data = batch()
    leaf = data["logprobs"].requires_grad_()
    data["old_logprobs"] = leaf.detach()
    segments = torch.arange(37) // 5
    loss, _ = policy_loss(**data, **CLIP, denominator=20, loss_mode=mode, segments=segments)
    loss.backward()
    torch.testing.assert_close(leaf.grad, -data["advantages"] * data["mask"] / 20)


@pytest.mark.parametrize("mode", ["vanilla", "gspo", "cispo"])
def test_weights_scale_each_tokens_gradient(mode: Any) -> None:
    data, weights = batch(), torch.linspace(0, 3, 37)
    leaf = data["logprobs"].requires_grad_()
    gradients = []
    for given in (None, weights):
        leaf.grad = None
        loss, _ = policy_loss(
            **data, **CLIP, denominator=20, loss_mode=mode, segments=torch.arange(37) // 5,
            weights=given,
        )  # fmt: skip
        loss.backward()
        assert leaf.grad is not None
        gradients.append(leaf.grad.clone())
    torch.testing.assert_close(gradients[0] * weights, gradients[1])


@pytest.mark.parametrize("cuts", [[0, 10, 37], [0, 5, 20, 37]])
def test_gspo_does_not_depend_on_how_whole_sequences_are_split(cuts: list[int]) -> None:
    data, segments = batch(), torch.arange(37) // 5
    leaf = data["logprobs"].requires_grad_()

    def loss_of(part: slice) -> Tensor:
        arguments = {name: values[part] for name, values in data.items()}
        return policy_loss(
            **arguments, **CLIP, denominator=11, loss_mode="gspo", segments=segments[part]
        )[0]

    gradient = split_gradients(loss_of, leaf, cuts)
    torch.testing.assert_close(gradient, split_gradients(loss_of, leaf, [0, 37]))


@pytest.mark.parametrize(
    ("mode", "value"),
    [
        ("token-mean", 5 / 4),
        ("seq-mean-token-mean", 3 / 2),
        ("seq-mean-token-sum", 5 / 2),
        ("seq-mean-token-sum-norm", 1 / 4),
    ],
)
def test_aggregation_by_hand(mode: Any, value: float) -> None:
    weights, denominator = aggregation([1, 3], mode, max_tokens=10)
    losses = [[2.0], [1.0, 1.0, 1.0]]
    total = sum(w * sum(own) for w, own in zip(weights, losses, strict=True))
    assert total / denominator == pytest.approx(value)


@pytest.mark.parametrize(
    ("estimator", "values", "gradient"),
    [
        # difference d = ref - new: 0.5, -1, and a masked one
        ("k1", [-0.5, 1.0, 0.0], [1.0, 1.0, 0.0]),
        ("k2", [0.125, 0.5, 0.0], [-0.5, 1.0, 0.0]),
        (
            "k3",
            [math.exp(0.5) - 1.5, math.exp(-1), 0.0],
            [1 - math.exp(0.5), 1 - math.exp(-1), 0.0],
        ),
    ],
)
def test_kl_by_hand(estimator: Any, values: list[float], gradient: list[float]) -> None:
    new = torch.tensor([-2.0, -1.0, -1.0], requires_grad=True)
    ref = torch.tensor([-1.5, -2.0, 900.0])
    found = kl_penalty(new, ref, torch.tensor([1.0, 1.0, 0.0]), estimator)
    assert found.tolist() == pytest.approx(values, rel=1e-5)
    found.sum().backward()
    assert new.grad is not None and new.grad.tolist() == pytest.approx(gradient, rel=1e-5)


def test_k1_and_k3_estimate_the_divergence_without_bias() -> None:
    """Weighted by the policy's own probabilities they sum to it exactly; k2 does not."""
    generator = torch.Generator().manual_seed(4)
    policy, reference = torch.randn(2, 9, generator=generator).log_softmax(-1)
    divergence = (policy.exp() * (policy - reference)).sum()
    ones = torch.ones(9)
    for estimator in ("k1", "k3"):
        found = (policy.exp() * kl_penalty(policy, reference, ones, estimator)).sum()
        torch.testing.assert_close(found, divergence)
    biased = (policy.exp() * kl_penalty(policy, reference, ones, "k2")).sum()
    assert abs(biased - divergence) > 0.01


@pytest.mark.parametrize(
    ("mode", "weights", "cut"),
    [
        ("none", [1.0, 1.0, 1.0, 1.0], 0),
        ("tis", [0.25, 1.0, 2.0, 2.0], 1),
        ("mis", [0.25, 1.0, 2.0, 0.0], 1),
        ("icepop", [0.0, 1.0, 2.0, 0.0], 2),
    ],
)
def test_importance_weights_by_hand(mode: Any, weights: list[float], cut: int) -> None:
    """Trainer over engine: 1/4, 1, 2, 8, and a masked position."""
    ratios = torch.tensor([0.25, 1.0, 2.0, 8.0, 999.0])
    engine = torch.tensor([-1.0, -2.0, -3.0, -4.0, 0.0])
    old = (engine + ratios.log()).requires_grad_()
    mask = torch.tensor([1.0, 1, 1, 1, 0])
    found, metrics = importance_weights(old, engine, mask, mode, low=0.5, high=2.0 + 1e-5)
    assert found[:4].tolist() == pytest.approx(weights, rel=1e-4)
    assert not found.requires_grad
    assert metrics["rollout_cut"] == cut
    assert metrics["rollout_weight"].item() == pytest.approx(11.25, rel=1e-5)
    logs = [math.log(r) for r in (0.25, 1, 2, 8)]
    assert metrics["rollout_kl"].item() == pytest.approx(11.25 - 4 - sum(logs), rel=1e-5)


def test_weighted_sum_does_not_read_outside_of_the_mask() -> None:
    values = torch.tensor([2.0, math.nan, 3.0])
    mask, weights = torch.tensor([1.0, 0, 1]), torch.tensor([0.5, 1.0, 2.0])
    assert weighted_sum(values, mask, weights) == 7
    assert weighted_sum(values, mask) == 5


@pytest.mark.parametrize(
    ("bound", "values", "slopes"),
    [
        ("none", [0.5, 30.0, -30.0], [1.0, 1.0, 1.0]),
        ("clip", [0.5, 10.0, -10.0], [1.0, 0.0, 0.0]),
        (
            "tanh",
            [10 * math.tanh(0.05), 10 * math.tanh(3), -10 * math.tanh(3)],
            [1 - math.tanh(0.05) ** 2, 1 - math.tanh(3) ** 2, 1 - math.tanh(3) ** 2],
        ),
    ],
)
def test_bounds_of_scores_by_hand(bound: Any, values: list[float], slopes: list[float]) -> None:
    """Only the clamp takes the gradient of a score beyond the limit away."""
    scores = torch.tensor([0.5, 30.0, -30.0], requires_grad=True)
    found = bound_scores(scores, bound, 10.0)
    assert found.tolist() == pytest.approx(values, rel=1e-5)
    found.sum().backward()
    assert scores.grad is not None and scores.grad.tolist() == pytest.approx(slopes, rel=1e-3)


def test_local_pair_weights_by_hand() -> None:
    """Six responses in micro-batches of four (one valid) and two (both valid): three pairs."""
    valid = torch.tensor([True, False, False, False, True, True])
    found = local_pair_weights([[0, 1, 2, 3], [4, 5]], valid)
    # what they sum to when divided by the three: 4/6 for the first, 2/6 shared by the others
    assert (found / 3).tolist() == pytest.approx([4 / 6, 0, 0, 0, 1 / 6, 1 / 6])
    assert local_pair_weights([[0, 1], [2, 3]], torch.ones(4) > 0).tolist() == [1, 1, 1, 1]
    found = local_pair_weights([[0], [1, 2]], torch.tensor([False, True, True]))
    assert found.tolist() == pytest.approx([0, 2 / 3, 2 / 3])


def test_fallback_loss_by_hand() -> None:
    """Two ranks of three micro-batches; on the second no response of either rank is valid."""
    plan = [[[0, 1], [2, 3, 6], []], [[4], [5], [7]]]
    valid = torch.tensor([False, True, False, False, False, False, False, True])
    teacher = torch.tensor([9.0, 9, 2, -1, 9, 0.5, 2, 9], requires_grad=True)
    found = fallback_loss(teacher, plan, valid)
    # means of 1 for three of the eight responses and of 0.5 for one
    wanted = 0.01 * (3 / 8 * math.log1p(math.exp(-1)) + 1 / 8 * math.log1p(math.exp(-0.5)))
    assert found.item() == pytest.approx(wanted, rel=1e-5)
    found.backward()
    slope = -0.01 / 8 / (1 + math.e)
    assert teacher.grad is not None
    assert teacher.grad.tolist() == pytest.approx(
        [0, 0, slope, slope, 0, -0.01 / 8 / (1 + math.exp(0.5)), slope, 0], rel=1e-5
    )
    assert fallback_loss(teacher, plan, torch.ones(8) > 0).item() == 0
    assert fallback_loss(teacher, [], valid).item() == 0


def test_the_documented_fallback_loss() -> None:
    valid = torch.tensor([True, False, False, True])
    found = fallback_loss(torch.tensor([5.0, 5, 0, 5]), [[[0, 1], [2]], [[3], []]], valid)
    assert found.item() == pytest.approx(0.01 / 4 * math.log(2), rel=1e-6)


def test_bradley_terry_weights_pairs() -> None:
    teacher, student = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 1.0])
    found, _ = bradley_terry_loss(teacher, student, 2, torch.tensor([0.5, 3.0]))
    wanted = (0.5 * math.log1p(math.exp(-2)) + 3 * math.log1p(math.exp(1))) / 2
    assert found.item() == pytest.approx(wanted, rel=1e-6)
