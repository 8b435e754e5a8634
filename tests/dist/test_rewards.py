"""Rewards over several ranks: each scores its share, all get the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.distributed as dist

from prism_megatron.config.schema import Rewards
from prism_megatron.objectives.rewards.scorer import Scorer
from prism_megatron.objectives.rewards.types import Reward, RewardItem
from prism_megatron.rollout.fleet import share_out
from tests.dist.ranks import Ranks


def rewards_of(answers: Sequence[str]) -> tuple[int, list[Reward]]:
    scorer = Scorer(Rewards(workers=1))
    frame = "<caption>c</caption><think>t</think><answer>{}</answer>"
    items = [RewardItem(frame.format(answer), "3x") for answer in answers]
    own: list[RewardItem] = []

    def score(mine: Sequence[RewardItem]) -> list[Reward]:
        own.extend(mine)
        return scorer.score(mine)

    try:
        rewards = share_out(items, score)
    finally:
        scorer.close()
    assert own == items[dist.get_rank() :: dist.get_world_size()]
    return len(own), rewards


def test_each_rank_scores_its_share_and_all_get_all(ranks: Callable[[int], Ranks]) -> None:
    answers = ["2x+x", "2x", "3x", "4x-x", "x"]
    (first, of_first), (second, of_second) = ranks(2).run(rewards_of, answers)
    assert (first, second) == (3, 2)
    assert of_first == of_second
    assert [reward.accuracy for reward in of_first] == [1, 0, 1, 1, 0]
