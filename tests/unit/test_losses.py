"""Losses against plain formulas, their gradients, and their independence of the split."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from prism_megatron.objectives.losses import (
    bradley_terry_loss,
    policy_loss,
    score_regulariser,
    sft_loss,
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
    loss, _ = policy_loss(**data, **CLIP, num_tokens=50, dual_clip=dual)
    rows = zip(*(data[name].tolist() for name in data), strict=True)
    expected = sum(policy_token_loss(n, o, a, dual) for n, o, a, masked in rows if masked) / 50
    assert loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("dual", [None, 1.4])
def test_policy_gradient_equals_finite_differences(dual: float | None) -> None:
    data = batch()
    leaf = data["logprobs"].requires_grad_()
    loss, _ = policy_loss(**data, **CLIP, num_tokens=50, dual_clip=dual)
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
        num_tokens=1,
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
    loss, metrics = policy_loss(**data, **CLIP, num_tokens=20)
    loss.backward()
    torch.testing.assert_close(leaf.grad, -data["advantages"] * data["mask"] / 20)
    assert metrics["ratio"] == metrics["tokens"] == data["mask"].sum()
    assert metrics["approx_kl"] == 0


def test_policy_metrics_are_sums_over_the_mask() -> None:
    data = batch()
    _, metrics = policy_loss(**data, **CLIP, num_tokens=1000)
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
        loss, metrics = policy_loss(**arguments, **CLIP, num_tokens=count)
        for name, value in metrics.items():
            totals[name] = totals.get(name, torch.zeros(())) + value
        return loss

    gradient = split_gradients(loss_of, leaf, cuts)
    leaf.grad = None
    loss, metrics = policy_loss(**data, **CLIP, num_tokens=count)
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
        num_tokens=1,
    )
    loss.backward()
    assert logprobs.grad is not None and logprobs.grad.tolist() == [-1, 0, 0]
    assert metrics["tokens"] == metrics["ratio"] == 1


def test_dual_clip_must_lie_above_one() -> None:
    with pytest.raises(ValueError, match="dual_clip=1.0"):
        policy_loss(**batch(), **CLIP, num_tokens=1, dual_clip=1.0)


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
    with pytest.raises(ValueError, match=f"num_tokens={count}"):
        policy_loss(ones, ones, ones, ones, **CLIP, num_tokens=count)
    with pytest.raises(ValueError, match=f"num_pairs={count}"):
        bradley_terry_loss(ones, ones, count)
    with pytest.raises(ValueError, match=f"count={count}"):
        score_regulariser(ones, count)
