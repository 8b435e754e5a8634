"""Images go to ranks by the work that they are."""

from __future__ import annotations

from dataclasses import replace

import pytest

from model_providers.config import VisionConfig
from model_providers.image_shares import share_out

VISION = VisionConfig(
    depth=27,
    hidden_size=1152,
    intermediate_size=4304,
    num_heads=16,
    out_hidden_size=4096,
    in_channels=3,
    patch_size=16,
    temporal_patch_size=2,
    spatial_merge_size=2,
    num_position_embeddings=2304,
    deepstack_visual_indexes=(8, 16, 24),
)


@pytest.mark.parametrize(
    "costs, ranks, shares",
    [
        ([1, 8, 3, 4, 2], 2, [[0, 1], [2, 3, 4]]),
        ([5, 5, 5], 2, [[0, 2], [1]]),
        ([2], 3, [[0], [], []]),
        ([3, 9], 1, [[0, 1]]),
    ],
)
def test_the_most_expensive_image_goes_to_the_rank_with_least_work(
    costs: list[float], ranks: int, shares: list[list[int]]
) -> None:
    assert share_out(costs, ranks) == shares


def test_attention_makes_a_large_frame_dearer_than_its_patches_in_many() -> None:
    many, large = VISION.work(16, 24, 32), VISION.work(1, 96, 128)
    linear = 16 * 24 * 32 * (2 * 1152 + 4304)
    assert many == linear + 16 * (24 * 32) ** 2
    assert large == linear + (16 * 24 * 32) ** 2
    assert replace(VISION, intermediate_size=4305).work(1, 2, 4) == VISION.work(1, 2, 4) + 8
