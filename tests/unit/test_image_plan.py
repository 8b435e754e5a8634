"""Images go to ranks by the work that they are, and features to the ranks that show them."""

from __future__ import annotations

import random
from dataclasses import replace
from math import prod

import pytest
import torch

from model_providers.architecture import VisionConfig
from prism_megatron.data.image_plan import plan_images, share_out
from prism_megatron.types import ImageShare, VisualInputs

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


MERGE = 2


@pytest.mark.parametrize(
    "costs, shown, encoder",
    [
        # all on one rank: the largest stays, the rest goes where there is least work
        ([1, 8, 3, 4, 2], [[0, 1, 2, 3, 4], []], [0, 0, 1, 1, 1]),
        # nobody has more than the mean, or than the largest image
        ([5, 4, 6, 3], [[0, 1], [2, 3]], [0, 0, 1, 1]),
        ([9, 2, 1, 3], [[0], [1, 2, 3], []], [0, 1, 1, 1]),
        # a little above the mean, but nobody has less to do
        ([5, 2, 4, 2], [[0, 1], [2, 3]], [0, 0, 1, 1]),
        # several show it
        ([7, 2, 6], [[0, 1, 2], [0, 1, 2]], [0, 1, 1]),
        ([4, 5], [[0, 1], [1], [0]], [2, 0]),
        ([2], [[], [0], []], [1]),
        ([3, 9], [[0, 1]], [0, 0]),
        ([], [[], []], []),
    ],
)
def test_images_stay_where_they_are_shown_unless_there_is_too_much_work(
    costs: list[float], shown: list[list[int]], encoder: list[int]
) -> None:
    assert share_out(costs, shown) == encoder


def random_images(
    generator: random.Random, ranks: int, count: int
) -> tuple[list[VisualInputs], list[list[int]]]:
    """Images and videos of many sizes; what each of the ranks shows, most of it on few ranks."""
    visuals = []
    for number in range(count):
        grid = (generator.choice([1, 1, 3]), *(2 * generator.randint(1, 9) for _ in range(2)))
        visuals.append(VisualInputs(f"{number}", torch.empty(0), grid))
    shown: list[list[int]] = [[] for _ in range(ranks)]
    for number in range(count):
        for _ in range(generator.choice([1, 1, 1, 2, 5])):
            shown[int(ranks * generator.random() ** 2)].append(number)
    return visuals, shown


@pytest.mark.parametrize("ranks, count", [(2, 5), (3, 40), (64, 50), (64, 700), (5, 0)])
def test_work_is_balanced_within_the_largest_image(ranks: int, count: int) -> None:
    visuals, shown = random_images(random.Random(ranks * count), ranks, count)
    costs = [VISION.work(*visual.grid_thw) for visual in visuals]
    encoder = share_out(costs, shown)
    work = [0.0] * ranks
    for image, rank in enumerate(encoder):
        work[rank] += costs[image]
    largest, mean = max(costs, default=0), sum(costs) / ranks
    assert max(work) <= mean + largest
    # what a rank gives away would not have fitted beside the rest
    for rank, images in enumerate(shown):
        if any(encoder[i] != rank and rank in _only_on(shown, i) for i in images):
            assert work[rank] > max(mean, largest) - largest


def _only_on(shown: list[list[int]], image: int) -> set[int]:
    ranks = {rank for rank, images in enumerate(shown) if image in images}
    return ranks if len(ranks) == 1 else set()


@pytest.mark.parametrize("ranks, count", [(2, 5), (3, 40), (7, 11), (64, 90), (1, 6), (4, 0)])
def test_every_rank_gets_the_features_of_what_it_shows(ranks: int, count: int) -> None:
    """The exchange of all ranks by hand; a feature row is named by its image and its number."""
    visuals, numbers = random_images(random.Random(ranks + count), ranks, count)
    shown = [[visuals[i] for i in images] for images in numbers]
    plans = [plan_images(shown, r, work=VISION.work, merge_size=MERGE) for r in range(ranks)]
    encoded = [visual.key for plan in plans for visual in plan.encoded]
    assert sorted(encoded) == sorted({visual.key for images in shown for visual in images})
    features = [[row for visual in plan.encoded for row in _rows(visual)] for plan in plans]
    if ranks == 1 or not count:
        assert [plan.exchange for plan in plans] == [None] * ranks
        received = features
    else:
        exchanges = [plan.exchange for plan in plans]
        sent = [
            torch.split(exchange.send, exchange.send_counts) for exchange in exchanges if exchange
        ]
        assert len(sent) == ranks
        received = [
            [features[sender][row] for sender in range(ranks) for row in sent[sender][rank]]
            for rank in range(ranks)
        ]
        for rank, exchange in enumerate(exchanges):
            assert exchange and exchange.receive_counts == tuple(len(s[rank]) for s in sent)
    for images, plan, rows in zip(shown, plans, received, strict=True):
        assert plan.first.keys() == {visual.key for visual in images}
        for visual in images:
            first = plan.first[visual.key]
            wanted = _rows(visual)
            assert rows[first : first + len(wanted)] == wanted
        assert len(rows) == sum(len(_rows(v)) for v in {v.key: v for v in images}.values())


def _rows(visual: VisualInputs) -> list[tuple[str, int]]:
    return [(visual.key, row) for row in range(prod(visual.grid_thw) // MERGE**2)]


def test_nothing_travels_if_every_rank_encodes_what_it_shows() -> None:
    wide, tall, clip = (
        VisualInputs(str(grid), torch.empty(0), grid) for grid in ((1, 4, 8), (1, 8, 2), (3, 2, 2))
    )
    shown = [[tall, clip, tall], [wide], []]
    plans = [plan_images(shown, r, work=VISION.work, merge_size=MERGE) for r in range(3)]
    assert plans == [
        ImageShare((tall, clip), {tall.key: 0, clip.key: 4}),
        ImageShare((wide,), {wide.key: 0}),
        ImageShare((), {}),
    ]


def test_attention_makes_a_large_frame_dearer_than_its_patches_in_many() -> None:
    many, large = VISION.work(16, 24, 32), VISION.work(1, 96, 128)
    linear = 16 * 24 * 32 * (2 * 1152 + 4304)
    assert many == linear + 16 * (24 * 32) ** 2
    assert large == linear + (16 * 24 * 32) ** 2
    assert replace(VISION, intermediate_size=4305).work(1, 2, 4) == VISION.work(1, 2, 4) + 8
