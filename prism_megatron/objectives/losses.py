"""Losses of all stages, as sums over a micro-batch divided by counts over the whole step.

Every denominator is an argument and counts over all micro-batches and data-parallel ranks, so the
sum of the parts' losses (and gradients) is that of the whole, however it is split. The reference
divides by each micro-batch's own count, which lets packing decide how much a response weighs.

Metrics are detached float32 sums, to be added over micro-batches and ranks; the docstrings name
the count that turns each into a mean. Tensors: T packed tokens, n pairs or scores.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

Metrics = dict[str, Tensor]


def sft_loss(logprobs: Tensor, mask: Tensor, num_tokens: int) -> Tensor:
    """Cross-entropy of the tokens in the mask, divided by their number in the whole step.

    logprobs [T]: log-probability of each label; mask [T]: non-zero where the label is trained.
    """
    _check_count("num_tokens", num_tokens)
    return -_masked_sum(logprobs.float(), mask.bool()) / num_tokens


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    num_tokens: int,
    dual_clip: float | None = None,
) -> tuple[Tensor, Metrics]:
    """Clipped policy-gradient loss, a mean over the tokens of the whole step.

    With r = exp(logprobs - old_logprobs), a token's loss is
    -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) (PPO, equation 7; separate bounds as in
    DAPO). With dual_clip = c > 1 it is at most -c A where A < 0 (Ye et al. 2020, equation 3).
    All tensors [T]; values outside the mask are not read. At r = 1 the gradient is REINFORCE's.

    Metrics, each a sum over the tokens in the mask with denominator `tokens`: `ratio`; `approx_kl`
    = r - 1 - log r, an estimate of KL(old, new); `clipped_high`, `clipped_low` and `clipped_dual`,
    tokens whose gradient is cut to zero by that bound.
    """
    _check_count("num_tokens", num_tokens)
    if dual_clip is not None and dual_clip <= 1:
        raise ValueError(f"dual_clip={dual_clip} would bind at ratio 1; give a number above 1")
    mask = mask.bool()
    # Masked before exp: an unused position must not turn into inf and spoil the gradient with NaN.
    log_ratio = torch.where(mask, logprobs.float() - old_logprobs.float(), 0.0)
    advantages = torch.where(mask, advantages.float(), 0.0)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    surrogate = torch.minimum(ratio * advantages, clipped * advantages)
    negative = advantages < 0
    beyond_dual = torch.zeros_like(mask)
    if dual_clip is not None:
        beyond_dual = negative & (ratio > dual_clip)
        surrogate = torch.where(beyond_dual, dual_clip * advantages, surrogate)
    loss = -_masked_sum(surrogate, mask) / num_tokens
    metrics = {
        "tokens": mask,
        "ratio": torch.where(mask, ratio, 0.0),
        "approx_kl": torch.where(mask, ratio - 1 - log_ratio, 0.0),
        "clipped_high": (advantages > 0) & (ratio > 1 + clip_high),
        "clipped_low": negative & (ratio < 1 - clip_low),
        "clipped_dual": beyond_dual,
    }
    return loss, {name: values.detach().float().sum() for name, values in metrics.items()}


def bradley_terry_loss(teacher: Tensor, student: Tensor, num_pairs: int) -> tuple[Tensor, Metrics]:
    """-log sigmoid(teacher - student) of each pair, divided by the pairs of the whole step.

    teacher, student [n]: discriminator scores of one stream; the streams' losses add up (reference:
    train_moe_vl_warmup_fast.py, dp_critic.py). Scores are neither clamped nor patched here: the
    reference's clamp at 10 stops the gradient of a pair that is wrong by that much, and its zeros
    in place of NaN hide a broken step.

    Metrics: `pairs`, and with it as denominator `correct` (teacher strictly above) and `gap`
    (teacher - student). Raises ValueError if a score is not finite.
    """
    _check_count("num_pairs", num_pairs)
    assert teacher.shape == student.shape, (teacher.shape, student.shape)
    _check_scores("teacher", teacher)
    _check_scores("student", student)
    gap = teacher.float() - student.float()
    metrics = {
        "pairs": torch.tensor(float(gap.numel()), device=gap.device),
        "correct": (gap.detach() > 0).float().sum(),
        "gap": gap.detach().sum(),
    }
    return -functional.logsigmoid(gap).sum() / num_pairs, metrics


def score_regulariser(scores: Tensor, count: int) -> Tensor:
    """Sum of squared scores divided by their number in the whole step; pulls scores towards 0.

    scores [n]: teacher's and student's of both streams. The Bradley-Terry loss only sees
    differences, so nothing else holds the scores' level (reference: dp_critic.py, score_reg_coef).
    """
    _check_count("count", count)
    _check_scores("regularised", scores)
    return scores.float().square().sum() / count


def _masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, values, 0.0).sum()


def _check_count(name: str, count: int) -> None:
    if count < 1:
        raise ValueError(f"{name}={count}: the step has nothing to train on; check the data")


def _check_scores(name: str, scores: Tensor) -> None:
    bad = int((~torch.isfinite(scores)).sum())
    if bad:
        raise ValueError(
            f"{bad} of {scores.numel()} {name} scores are not finite; lower the discriminator's "
            "learning rate or restart it from an earlier checkpoint"
        )
