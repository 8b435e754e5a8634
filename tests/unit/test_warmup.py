"""The tokens at which the reference's warm-up scores, against its own way of finding them."""

from __future__ import annotations

import torch
from torch import Tensor

from prism_megatron.pipelines import warmup
from prism_megatron.types import Sequence


def sequence(length: int, first: int) -> Sequence:
    ids = torch.arange(first, first + length)
    return Sequence(ids, (), torch.ones(length, dtype=torch.bool))


def last_tokens(rows: Tensor, mask: Tensor) -> Tensor:
    """get_last_token_scores of value_head.py, of the ids themselves."""
    if mask[0, 0] == 0:
        return rows[:, -1]
    return rows[torch.arange(len(rows)), mask.sum(1) - 1]


def left_padded(side: list[Sequence], longest: int) -> tuple[Tensor, Tensor]:
    rows, mask = torch.zeros(2, len(side), longest, dtype=torch.int64)
    for i, each in enumerate(side):
        rows[i, longest - len(each) :] = each.input_ids
        mask[i, longest - len(each) :] = 1
    return rows, mask


def test_four_pairs_by_hand() -> None:
    """The teachers begin with the longest of all eight, the students don't."""
    teachers = [sequence(length, 100 * i) for i, length in enumerate((13, 12, 10, 6), 1)]
    students = [sequence(length, 100 * i) for i, length in enumerate((11, 5, 9, 8), 5)]
    seeds = range(100)
    # a draw in which the first teacher comes first
    seed = next(s for s in seeds if draw(4, s)[0] == 0)
    found, others = warmup.scored_as_the_reference(teachers, students, seed)
    # 2 l - 13 - 1; that of 6 tokens would lie before its start
    assert [each.scored for each in found] == [12, 10, 6, 0]
    assert [each.scored for each in others] == [None] * 4
    seed = next(s for s in seeds if draw(4, s)[0] == 1)
    both = warmup.scored_as_the_reference(teachers, students, seed)
    assert [each.scored for side in both for each in side] == [None] * 8


def draw(count: int, seed: int) -> list[int]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()


def test_batches_are_read_as_there() -> None:
    """Ten pairs, of which the last two make a batch of their own; the content of every scored token
    is what the reference would read, or the padding."""
    assert sum(moved(seed) for seed in range(20)) > 20


def moved(seed: int) -> int:
    """How many sequences are not scored at their last token."""
    lengths = torch.randint(3, 20, (2, 10), generator=torch.Generator().manual_seed(seed)).tolist()
    teachers, students = (
        [sequence(length, 100 * (10 * side + i + 1)) for i, length in enumerate(lengths[side])]
        for side in range(2)
    )
    found = warmup.scored_as_the_reference(teachers, students, seed)
    order, count = draw(10, seed), 0
    for first in range(0, 10, 4):
        members = order[first : first + 4]
        longest = max(len(side[i]) for side in (teachers, students) for i in members)
        for side, scored in zip((teachers, students), found, strict=True):
            wanted = last_tokens(*left_padded([side[i] for i in members], longest))
            for i, token in zip(members, wanted.tolist(), strict=True):
                place = scored[i].scored
                read = int(side[i].input_ids[-1 if place is None else place])
                assert read == (token or 100 * (read // 100))
                count += read != int(side[i].input_ids[-1])
    return count
