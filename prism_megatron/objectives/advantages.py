"""Group-relative advantages of GRPO and of adversarial alignment.

Shapes: B responses; groups [B] holds for each the id of its prompt, in any order.
"""

from __future__ import annotations

from collections.abc import Sequence as Ordered

import torch
from torch import Tensor

from prism_megatron.config.schema import Advantage, AdvantageMode


def group_normalise(
    scores: Tensor,
    groups: Tensor,
    valid: Tensor | None = None,
    eps: float = 1e-6,
    *,
    by_std: bool = True,
) -> Tensor:
    """Scores in units of their group's spread: (s - mean) / (std + eps), [B] float32.

    This is the advantage of GRPO when scores are rewards (DeepSeekMath, equation 3); with
    by_std=False it is s - mean, that of Dr. GRPO (Liu et al. 2025, section 3.2), which does not
    weigh easy and hard prompts up.
    scores [B]; groups [B] int64; valid [B] bool: only valid responses enter mean and std, the
    others get 0 and their scores are not read. std is unbiased. A group with one valid response or
    with equal scores gets 0: nothing sets its members apart. (The reference divides a lone score
    by 1 and thus hands out the raw score.)

    Raises ValueError if a valid score is not finite.

    Example: scores [1, 0, 0, 5], groups [7, 7, 7, 9] give [1.1547, -0.5774, -0.5774, 0].
    """
    if valid is None:
        valid = torch.ones_like(scores, dtype=torch.bool)
    _check_finite(scores, valid)
    _, group = torch.unique(groups, return_inverse=True)
    num_groups = int(group.max()) + 1 if group.numel() else 0
    weight = valid.double()
    values = torch.where(valid, scores.double(), 0.0)
    count = _group_sum(weight, group, num_groups)
    mean = (_group_sum(values, group, num_groups) / count.clamp(min=1))[group]
    centred = torch.where(valid, values - mean, 0.0)
    variance = _group_sum(centred.square(), group, num_groups) / (count - 1).clamp(min=1)
    # A rounded mean leaves equal scores a tiny spread, which must not be blown up to order one.
    differ = _group_spread(values, valid, group, num_groups) > 0
    normalised = centred / (variance.sqrt()[group] + eps) if by_std else centred
    return torch.where(differ[group], normalised, 0.0).float()


def alignment_advantage(
    streams: Ordered[tuple[float, Tensor]],
    groups: Tensor,
    valid: Tensor,
    *,
    options: Advantage,
    accuracy: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Advantage of each response in the alignment game, [B] float32.

    streams: weight and scores [B] of each, in PRISM the discriminator's D(prompt + caption) and
    D(prompt + think + answer), not read where invalid; groups [B] int64; valid [B] bool; accuracy
    [B]: whether the answer is right, which all modes but default look at.

    With GN = group_normalise, A_al = stream_advantage, F = 1 for an invalid response, else 0,
    W = 1 for a valid one with a wrong answer, else 0, penalty p_f = format_penalty, p_w =
    wrong_penalty, c = align_coef, rewards w_a = accuracy_weight and w_f = format_weight:

        default      A_al - p_f F
        acc_gating   c A_al - p_w W - p_f F
        gated_align  c A_al (1 - F)(1 - W) - p_w W - p_f F
        rlvr         GN(w_a acc + w_f (1 - F)) + c A_al (1 - F)(1 - W)
        rlvr_v2      GN(w_a acc + w_f (1 - F) - p_w W - p_f F) + c A_al (1 - F)(1 - W)
        sign_align   GN((1 - F)(w_a acc + w_f (1 - F) - p_w W) - p_f F) + c A_al (1 - F)(1 - 2 W)

    acc is 0 for an invalid response. Source: core_algos.py of the reference; the paper has the
    default mode (equations 1 and 3). With invalid_samples="corrected" the penalties that stand
    outside of a GN are centred in their group, like any reward with a baseline. A constant a group
    is no preference: without centring, a group that is invalid throughout would push all its tokens
    down, and keep doing so whatever the policy writes. In the default mode such a group then gives
    0, every group sums to 0, an invalid response still lies format_penalty below the mean valid
    one, and is bounded by [-format_penalty, 0]. With invalid_samples="reference" they are not.
    In the reference gated_align by itself is never told which answers are wrong, so that W = 0;
    gated_align_accuracy="reference" does the same.

    Example: one group, perception [2, 0, -, 1], reasoning [0, 0, -, 0], weights 0.5, penalty 1.5,
    default mode: GN(perception) = [1, -1, 0, 0], GN(reasoning) = 0, the penalty's mean is 0.375,
    hence A = [0.875, -0.125, -1.125, 0.375].
    """
    mode: AdvantageMode = options.advantage_mode
    aligned = stream_advantage(streams, groups, valid, options=options, eps=eps)
    invalid = (~valid).float()
    if mode == "default":
        return aligned - _penalty(options.format_penalty * invalid, groups, options)
    assert accuracy is not None, f"mode {mode} needs the answers' accuracy"
    acc = torch.where(valid, accuracy.float(), 0.0)
    wrong = (valid & (acc <= 0)).float()
    if mode == "gated_align" and options.gated_align_accuracy == "reference":
        wrong = torch.zeros_like(wrong)
    aligned = options.align_coef * aligned
    well_formed, wrong_cost = 1 - invalid, options.wrong_penalty * wrong
    reward = options.accuracy_weight * acc + options.format_weight * well_formed
    format_cost = options.format_penalty * invalid
    gated = aligned * well_formed * (1 - wrong)
    if mode == "acc_gating":
        return aligned - _penalty(wrong_cost + format_cost, groups, options)
    if mode == "gated_align":
        return gated - _penalty(wrong_cost + format_cost, groups, options)
    if mode == "rlvr":
        return group_normalise(reward, groups, eps=eps) + gated
    if mode == "rlvr_v2":
        return group_normalise(reward - wrong_cost - format_cost, groups, eps=eps) + gated
    shaped = well_formed * (reward - wrong_cost) - format_cost
    signed = aligned * well_formed * (1 - 2 * wrong)
    return group_normalise(shaped, groups, eps=eps) + signed


def stream_advantage(
    streams: Ordered[tuple[float, Tensor]],
    groups: Tensor,
    valid: Tensor,
    *,
    options: Advantage,
    eps: float = 1e-6,
) -> Tensor:
    """A_al: what the discriminator's scores alone say of each response, [B] float32.

    stream_combination="normalise_then_combine": sum over streams of weight * GN(scores), so that no
    stream outweighs another by scale (the reference's code). "combine_then_normalise": GN(sum over
    streams of weight * scores), in which a stream counts by its spread (the paper's equations 1 and
    3).

    invalid_samples="corrected": GN over valid responses only, the others get 0.
    "reference": an invalid response gets its group's lowest valid score less 1, in raw score units,
    or -1 where none is valid, and GN is over all. One of them can take most of the spread of the
    others away: among 16 whose valid scores have a deviation of 0.1 it gets -3.5, and the others'
    deviation falls to a third. A lone member's GN is then its raw score.
    """
    normalise = _normalise_valid if options.invalid_samples == "corrected" else _normalise_all
    if options.stream_combination == "combine_then_normalise":
        total = sum((weight * scores for weight, scores in streams), torch.zeros(len(groups)))
        streams = [(1.0, total)]
    advantage = torch.zeros(len(groups))
    for weight, scores in streams:
        advantage = advantage + weight * normalise(scores, groups, valid, eps)
    return advantage


def overlong_penalty(lengths: Tensor, max_tokens: int, buffer: int, penalty: float) -> Tensor:
    """What is added to the rewards of long responses, [B] in [-penalty, 0] float32.

    0 up to max_tokens - buffer tokens, then falling linearly to -penalty at max_tokens (DAPO,
    equation 13, soft overlong punishment). lengths [B].

    Example: max_tokens=10, buffer=4, penalty=1 and lengths [6, 7, 10] give [0, -0.25, -1].
    """
    over = (lengths.float() - (max_tokens - buffer)) / buffer
    return -penalty * over.clamp(0, 1)


def _normalise_valid(scores: Tensor, groups: Tensor, valid: Tensor, eps: float) -> Tensor:
    return group_normalise(scores, groups, valid, eps)


def _normalise_all(scores: Tensor, groups: Tensor, valid: Tensor, eps: float) -> Tensor:
    """See stream_advantage, invalid_samples="reference"."""
    _check_finite(scores, valid)
    _, group = torch.unique(groups, return_inverse=True)
    num_groups = int(group.max()) + 1 if group.numel() else 0
    lowest = torch.full((num_groups,), torch.inf).scatter_reduce(
        0, group, torch.where(valid, scores.float(), torch.inf), "amin"
    )
    substitute = torch.where(lowest.isfinite(), lowest, 0.0)[group] - 1
    filled = torch.where(valid, scores.float(), substitute)
    alone = _group_sum(torch.ones_like(filled), group, num_groups)[group] == 1
    return torch.where(alone, filled / (1 + eps), group_normalise(filled, groups, eps=eps))


def _penalty(cost: Tensor, groups: Tensor, options: Advantage) -> Tensor:
    """The cost [B], less its group's mean unless as in the reference."""
    if options.invalid_samples == "reference":
        return cost
    _, group = torch.unique(groups, return_inverse=True)
    num_groups = int(group.max()) + 1 if group.numel() else 0
    size = _group_sum(torch.ones_like(cost), group, num_groups)
    return cost - (_group_sum(cost, group, num_groups) / size)[group]


def _group_sum(values: Tensor, group: Tensor, num_groups: int) -> Tensor:
    return values.new_zeros(num_groups).index_add(0, group, values)


def _group_spread(values: Tensor, valid: Tensor, group: Tensor, num_groups: int) -> Tensor:
    """Largest less smallest valid value of each group; -inf where none is valid."""
    empty = values.new_full((num_groups,), -torch.inf)
    highest = empty.scatter_reduce(0, group, torch.where(valid, values, -torch.inf), "amax")
    lowest = (-empty).scatter_reduce(0, group, torch.where(valid, values, torch.inf), "amin")
    return highest - lowest


def _check_finite(scores: Tensor, valid: Tensor) -> None:
    bad = valid & ~torch.isfinite(scores)
    if bad.any():
        rows = bad.nonzero().flatten().tolist()
        raise ValueError(
            f"{len(rows)} of {scores.numel()} scores are not finite (responses {rows[:8]}); "
            "lower the learning rate of the model that scores, or look for bad rows"
        )
