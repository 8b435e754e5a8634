"""Losses of all stages, as sums over a micro-batch divided by counts over the whole step.

Every denominator is an argument and counts over all micro-batches and data-parallel ranks, so the
sum of the parts' losses (and gradients) is that of the whole, however it is split. The reference
divides by each micro-batch's own count, which lets packing decide how much a response weighs.

Metrics are detached float32 sums, to be added over micro-batches and ranks; the docstrings name
the count that turns each into a mean. Tensors: T packed tokens, n pairs or scores.
"""

from __future__ import annotations

from collections.abc import Sequence as Ordered

import torch
from torch import Tensor
from torch.nn import functional

from prism_megatron.config.schema import KL, LossAggMode, LossMode, RolloutIS, ScoreBound

Metrics = dict[str, Tensor]


def sft_loss(logprobs: Tensor, mask: Tensor, num_tokens: int) -> Tensor:
    """Cross-entropy of the tokens in the mask, divided by their number in the whole step.

    logprobs [T]: log-probability of each label; mask [T]: non-zero where the label is trained.
    """
    _check_count("num_tokens", num_tokens)
    return -weighted_sum(logprobs.float(), mask) / num_tokens


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    denominator: float,
    dual_clip: float | None = None,
    loss_mode: LossMode = "vanilla",
    weights: Tensor | None = None,
    segments: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """Policy-gradient loss: sum over the tokens in the mask of weight * token loss / denominator.

    With r = exp(logprobs - old_logprobs) and A the advantage, a token's loss is
    - vanilla: -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) (PPO, equation 7; separate bounds
      as in DAPO). With dual_clip = c > 1 it is at most -c A where A < 0 (Ye et al. 2020,
      equation 3). At r = 1 the gradient is REINFORCE's.
    - gspo: the same with the sequence's ratio s = exp(mean over its tokens of log r) as value and
      each token's log-probability as what the gradient goes through (GSPO, equations 7 and 13).
    - cispo: -clip(r, 1 - clip_low, 1 + clip_high) A logprob, no gradient through the ratio, so
      that no token is left out (MiniMax-M1, equation 4).

    All tensors [T]; values outside the mask are not read. weights: what each token counts beside
    others (see `aggregation` and `importance_weights`), 1 if None. segments [T] int64: the number
    of each token's sequence, for gspo alone.

    Metrics, each a sum over the tokens in the mask with denominator `tokens`: `ratio`; `approx_kl`
    = r - 1 - log r, an estimate of KL(old, new); `clipped_high`, `clipped_low` and `clipped_dual`,
    tokens whose ratio is beyond that bound (vanilla, gspo: whose gradient it cuts to zero).
    """
    _check_count("denominator", denominator)
    if dual_clip is not None and dual_clip <= 1:
        raise ValueError(f"dual_clip={dual_clip} would bind at ratio 1; give a number above 1")
    mask = mask.bool()
    # Masked before exp: an unused position must not turn into inf and spoil the gradient with NaN.
    logprobs = torch.where(mask, logprobs.float(), 0.0)
    log_ratio = logprobs - torch.where(mask, old_logprobs.float(), 0.0)
    advantages = torch.where(mask, advantages.float(), 0.0)
    if loss_mode == "gspo":
        assert segments is not None, "gspo needs to know the sequences"
        mean = _segment_mean(log_ratio.detach(), mask, segments)
        log_ratio = torch.where(mask, logprobs - logprobs.detach() + mean, 0.0)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    positive, negative = advantages > 0, advantages < 0
    beyond_dual = torch.zeros_like(mask)
    if loss_mode == "cispo":
        surrogate = clipped.detach() * advantages * logprobs
        # the bounds hold for either sign of the advantage
        positive = negative = advantages != 0
    else:
        surrogate = torch.minimum(ratio * advantages, clipped * advantages)
        if dual_clip is not None:
            beyond_dual = negative & (ratio > dual_clip)
            surrogate = torch.where(beyond_dual, dual_clip * advantages, surrogate)
    loss = -weighted_sum(surrogate, mask, weights) / denominator
    metrics = {
        "tokens": mask,
        "ratio": torch.where(mask, ratio, 0.0),
        "approx_kl": torch.where(mask, ratio - 1 - log_ratio, 0.0),
        "clipped_high": positive & (ratio > 1 + clip_high),
        "clipped_low": negative & (ratio < 1 - clip_low),
        "clipped_dual": beyond_dual,
    }
    return loss, {name: values.detach().float().sum() for name, values in metrics.items()}


def aggregation(
    lengths: Ordered[int], mode: LossAggMode, max_tokens: int
) -> tuple[list[float], float]:
    """How token losses l make up a step's loss: sum_i weight_i sum_t l_it / denominator.

    lengths: tokens of each of the step's n responses, over all ranks. Returns a weight for each
    response, and the denominator (names as in verl):
    - token-mean: 1, sum of lengths. Every token counts the same (DAPO, equation 8).
    - seq-mean-token-mean: 1 / length_i, n. Every response counts the same (GRPO, equation 3).
    - seq-mean-token-sum: 1, n.
    - seq-mean-token-sum-norm: 1, n * max_tokens. A constant in place of the length, so that long
      wrong responses are not favoured (Dr. GRPO, section 3.2).

    Example: lengths [1, 3] and losses [[2], [1, 1, 1]] give 5/4, 3/2, 5/2 and, at max_tokens=10,
    1/4.
    """
    ones = [1.0] * len(lengths)
    if mode == "token-mean":
        return ones, sum(lengths)
    if mode == "seq-mean-token-mean":
        return [1 / length for length in lengths], len(lengths)
    scale = max_tokens if mode == "seq-mean-token-sum-norm" else 1
    return ones, len(lengths) * scale


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, estimator: KL) -> Tensor:
    """Each token's estimate of KL(policy, reference), [T]; 0 outside the mask.

    With d = ref_logprobs - logprobs (Schulman 2020, "Approximating KL divergence"):
    - k1 = -d: unbiased, but its gradient is 0 on average, so as a loss it only adds noise;
    - k2 = d^2 / 2: biased, its gradient is that of the KL divergence;
    - k3 = exp(d) - d - 1: unbiased and never negative (GRPO, equation 4).
    All tensors [T]; values outside the mask are not read. No correction for the tokens being
    sampled from an older policy.
    """
    difference = torch.where(mask.bool(), ref_logprobs.float() - logprobs.float(), 0.0)
    if estimator == "k1":
        return -difference
    if estimator == "k2":
        return difference.square() / 2
    return difference.exp() - difference - 1


def importance_weights(
    old_logprobs: Tensor,
    rollout_logprobs: Tensor,
    mask: Tensor,
    mode: RolloutIS,
    *,
    low: float,
    high: float,
) -> tuple[Tensor, Metrics]:
    """What each token's loss counts, because the engine sampled it and not the trainer, [T].

    With w = exp(old_logprobs - rollout_logprobs), trainer's over engine's probability:
    - tis: min(w, high), truncated importance sampling (Yao et al. 2025);
    - mis: w where w <= high, else 0, masked importance sampling (Liu et al. 2025);
    - icepop: w where low <= w <= high, else 0 (Ring-1T, section 3.2);
    - none: 1.
    Without a gradient. All tensors [T]; values outside the mask are not read.

    Metrics, sums over the mask: `rollout_weight` (of w), `rollout_kl` = w - 1 - log w, an estimate
    of KL(engine, trainer), and `rollout_cut`, tokens that were truncated or left out.
    """
    log_weight = torch.where(mask.bool(), old_logprobs.float() - rollout_logprobs.float(), 0.0)
    log_weight = log_weight.detach()
    weight = log_weight.exp()
    if mode == "none":
        cut, used = torch.zeros_like(mask.bool()), torch.ones_like(weight)
    elif mode == "tis":
        cut, used = weight > high, weight.clamp(max=high)
    else:
        cut = (weight > high) | (weight < (low if mode == "icepop" else 0.0))
        used = torch.where(cut, 0.0, weight)
    metrics = {
        "rollout_weight": weight * mask,
        "rollout_kl": weight - 1 - log_weight,
        "rollout_cut": cut,
    }
    return used, {name: values.float().sum() for name, values in metrics.items()}


def weighted_sum(values: Tensor, mask: Tensor, weights: Tensor | None = None) -> Tensor:
    """Sum over the mask of weight times value; neither is read outside."""
    values = values if weights is None else values * weights
    return torch.where(mask.bool(), values, 0.0).sum()


def _segment_mean(values: Tensor, mask: Tensor, segments: Tensor) -> Tensor:
    """Of each token's sequence the mean over the mask, [T]; 0 for sequences without any."""
    size = int(segments.max()) + 1
    total = values.new_zeros(size).index_add(0, segments, torch.where(mask, values, 0.0))
    count = values.new_zeros(size).index_add(0, segments, mask.to(values.dtype))
    return (total / count.clamp(min=1))[segments]


def bound_scores(scores: Tensor, bound: ScoreBound, limit: float) -> Tensor:
    """Scores as they are (none), clamped to +-limit (clip), or limit * tanh(scores / limit).

    A clamp has no gradient beyond its limit, so that a pair which is wrong by that much stays wrong
    (reference: dp_critic.py, score_clip=10); tanh has one everywhere and leaves small scores
    almost as they are.
    """
    if bound == "clip":
        return scores.clamp(-limit, limit)
    return limit * torch.tanh(scores / limit) if bound == "tanh" else scores


def bradley_terry_loss(
    teacher: Tensor, student: Tensor, num_pairs: int, weights: Tensor | None = None
) -> tuple[Tensor, Metrics]:
    """-log sigmoid(teacher - student) of each pair, divided by the pairs of the whole step.

    teacher, student [n]: discriminator scores of one stream; the streams' losses add up (reference:
    train_moe_vl_warmup_fast.py, dp_critic.py). Scores are not patched here: the reference's zeros
    in place of NaN hide a broken step. weights [n]: what each pair counts instead of 1 (see
    `local_pair_weights`).

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
    losses = -functional.logsigmoid(gap)
    losses = losses if weights is None else losses * weights
    return losses.sum() / num_pairs, metrics


def local_pair_weights(micro_batches: Ordered[Ordered[int]], valid: Tensor) -> Tensor:
    """What the reference lets each response's pair count beside 1, [B]; 0 where invalid.

    It divides a micro-batch's pairs by the valid responses in it and weighs the micro-batch by all
    its responses, so that with v valid among m responses of a micro-batch, V valid and B in all, a
    pair counts m V / (v B) instead of 1: packing decides how much a response weighs (reference:
    dp_critic.py, update_critic). micro_batches: indices into the B responses; valid [B] bool.
    """
    weights = torch.zeros(len(valid))
    for members in micro_batches:
        inside = valid[list(members)]
        share = len(members) / len(valid) * float(valid.sum())
        weights[list(members)] = inside * share / max(1, int(inside.sum()))
    return weights


def fallback_loss(teacher: Tensor, plan: Ordered[Ordered[Ordered[int]]], valid: Tensor) -> Tensor:
    """What the reference adds for micro-batches that have no valid response on any rank.

    0.01 * -log sigmoid(mean teacher score) of each, by its share of the step's B responses: it
    raises the teacher's scores with no student to compare them with (reference: dp_critic.py,
    update_critic). teacher [B]: of one stream, the score of each response's teacher; valid [B]
    bool; plan[rank][k]: indices into the B responses, ranks run their k-th micro-batches together.

    Example: plan [[[0, 1], [2]], [[3], []]], all but 0 and 3 invalid, teacher score 0 of response
    2: only the micro-batch [2] has none, and adds 0.01 * 1/4 * log 2.
    """
    total = teacher.new_zeros(())
    for together in zip(*plan, strict=True):
        if any(bool(valid[list(members)].any()) for members in together if members):
            continue
        for members in filter(None, together):
            share = len(members) / len(valid)
            total = total - 0.01 * share * functional.logsigmoid(teacher[list(members)].mean())
    return total


def score_regulariser(scores: Tensor, count: int) -> Tensor:
    """Sum of squared scores divided by their number in the whole step; pulls scores towards 0.

    scores [n]: teacher's and student's of both streams. The Bradley-Terry loss only sees
    differences, so nothing else holds the scores' level (reference: dp_critic.py, score_reg_coef).
    """
    _check_count("count", count)
    _check_scores("regularised", scores)
    return scores.float().square().sum() / count


def _check_count(name: str, count: float) -> None:
    if count < 1:
        raise ValueError(f"{name}={count}: the step has nothing to train on; check the data")


def _check_scores(name: str, scores: Tensor) -> None:
    bad = int((~torch.isfinite(scores)).sum())
    if bad:
        raise ValueError(
            f"{bad} of {scores.numel()} {name} scores are not finite; lower the discriminator's "
            "learning rate or restart it from an earlier checkpoint"
        )
