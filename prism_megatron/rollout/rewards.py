"""What a data row and a response to it say to the rewards."""

from __future__ import annotations

from prism_megatron.data.rows import PromptRow
from prism_megatron.objectives.rewards.types import RewardItem


def reward_item(row: PromptRow, response: str, *, finished: bool = True) -> RewardItem:
    return RewardItem(
        response=response,
        ground_truth=row.ground_truth,
        data_source=row.data_source,
        equivalent_answers=row.equivalents,
        question=row.question,
        finished=finished,
    )
