"""Group-relative advantages of GRPO and of adversarial alignment.

Shapes: B responses; groups [B] holds for each the id of its prompt, in any order.
"""

from __future__ import annotations

from collections.abc import Sequence as Ordered

import torch
from torch import Tensor


def group_normalise(
    scores: Tensor, groups: Tensor, valid: Tensor | None = None, eps: float = 1e-6
) -> Tensor:
    """Scores in units of their group's spread: (s - mean) / (std + eps), [B] float32.

    This is the advantage of GRPO when scores are rewards (DeepSeekMath, equation 3).
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
    normalised = centred / (variance.sqrt()[group] + eps)
    return torch.where(differ[group], normalised, 0.0).float()


def alignment_advantage(
    streams: Ordered[tuple[float, Tensor]],
    groups: Tensor,
    valid: Tensor,
    *,
    format_penalty: float,
    eps: float = 1e-6,
) -> Tensor:
    """Advantage of each response in the alignment game, [B] float32.

    With GN = group_normalise over valid responses and F = 1 for an invalid response, else 0:

        A = sum over streams of weight * GN(scores) - format_penalty * (F - group's mean of F)

    streams: weight and scores [B] of each, in PRISM the discriminator's D(prompt + caption) and
    D(prompt + think + answer), not read where invalid; groups [B] int64; valid [B] bool.

    Source: paper, equations 1 and 3, in the form of the reference's default mode (core_algos.py):
    each stream is normalised by itself and then weighed, so that neither outweighs the other by
    scale. Two things are corrected.
    - Invalid responses have no score. The reference gives them the group's lowest score less 1, in
      raw score units, and the penalty besides: one of them can take most of the spread of the
      others away and gets -5. Here it loses format_penalty once and the others' GN is untouched.
    - The penalty is centred in its group like any reward with a baseline. A constant a group is no
      preference: without centring, a group that is invalid throughout would push all its tokens
      down, and keep doing so whatever the policy writes. With it such a group gives 0, every
      group sums to 0, an invalid response still lies format_penalty below the mean valid one, and
      is bounded by [-format_penalty, 0].

    Example: one group, perception [2, 0, -, 1], reasoning [0, 0, -, 0], weights 0.5, penalty 1.5:
    GN(perception) = [1, -1, 0, 0], GN(reasoning) = 0, the penalty's mean is 0.375, hence
    A = [0.875, -0.125, -1.125, 0.375].
    """
    advantage = torch.zeros(len(groups))
    for weight, scores in streams:
        advantage = advantage + weight * group_normalise(scores, groups, valid, eps)
    _, group = torch.unique(groups, return_inverse=True)
    invalid = (~valid).float()
    num_groups = int(group.max()) + 1 if group.numel() else 0
    size = _group_sum(torch.ones_like(invalid), group, num_groups)
    share = (_group_sum(invalid, group, num_groups) / size)[group]
    return advantage - format_penalty * (invalid - share)


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
