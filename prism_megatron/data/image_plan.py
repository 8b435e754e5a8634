"""Which rank encodes which image, and which features travel between ranks.

    what each rank shows --share_out--> the rank that encodes each distinct image
                         --plan_images--> one rank's images, and the rows that it sends and receives

Ranks are those of one pipeline stage that differ in data and context, numbered context first; with
a replicated tower also those that differ in tensor, which is numbered before context.
Every rank knows all sequences of a step, so each plans for itself, and all plan the same.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Ordered

import torch

from prism_megatron.types import FeatureExchange, ImageShare, VisualInputs


def share_out(costs: Ordered[float], shown: Ordered[Ordered[int]]) -> list[int]:
    """The rank that encodes each image. costs: the work of each; shown: the numbers of the images
    that each rank shows, every image on one rank at least.

    The largest first, an image stays with a rank that shows it unless this rank's work would exceed
    both the mean and the largest image: nobody can be done sooner than that. What is left goes to
    the rank with the least work, so that none exceeds the mean by more than the largest image.
    Depends on the arguments alone.
    """
    showing: list[list[int]] = [[] for _ in costs]
    for rank, images in enumerate(shown):
        for image in images:
            showing[image].append(rank)
    enough = max(sum(costs) / len(shown), max(costs, default=0.0))
    work = [0.0] * len(shown)
    encoder = [-1] * len(costs)
    left = []
    for image in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        rank = min(showing[image], key=work.__getitem__)
        if work[rank] + costs[image] > enough:
            left.append(image)
            continue
        encoder[image] = rank
        work[rank] += costs[image]
    heap = [(work[rank], rank) for rank in range(len(shown))]
    heapq.heapify(heap)
    for image in left:
        while heap[0][0] < work[heap[0][1]]:
            # has got an image since, as one of those that show it
            heapq.heapreplace(heap, (work[heap[0][1]], heap[0][1]))
        rank = min(showing[image], key=work.__getitem__)
        if work[rank] > heap[0][0]:
            rank = heap[0][1]
        encoder[image] = rank
        work[rank] += costs[image]
    return encoder


def feature_rows(visual: VisualInputs, merge_size: int) -> int:
    """Rows of an image's or a video's features, one a visual token."""
    return math.prod(visual.grid_thw) // merge_size**2


def first_rows(visuals: Iterable[VisualInputs], merge_size: int) -> dict[str, int]:
    """By key, the first feature row of each, one after the other."""
    first, total = {}, 0
    for visual in visuals:
        first[visual.key] = total
        total += feature_rows(visual, merge_size)
    return first


def plan_images(
    shown: Ordered[Ordered[VisualInputs]],
    rank: int,
    *,
    work: Callable[[int, int, int], float],
    merge_size: int,
) -> ImageShare:
    """The share of `rank` in the images and videos of a micro-batch.

    shown: what each rank shows, also several times; work: cost of encoding a grid (t, h, w).
    """
    visuals = {visual.key: visual for images in shown for visual in images}
    number = {key: i for i, key in enumerate(visuals)}
    images = list(visuals.values())
    wanted = [sorted({number[visual.key] for visual in each}) for each in shown]
    encoder = share_out([work(*image.grid_thw) for image in images], wanted)
    encoded = [image for i, image in enumerate(images) if encoder[i] == rank]
    if all(encoder[i] == r for r, numbers in enumerate(wanted) for i in numbers):
        return ImageShare(tuple(encoded), first_rows(encoded, merge_size))
    rows = [feature_rows(image, merge_size) for image in images]
    place = first_rows(encoded, merge_size)
    sent = [[i for i in numbers if encoder[i] == rank] for numbers in wanted]
    send = [torch.arange(rows[i]) + place[images[i].key] for numbers in sent for i in numbers]
    received = sorted(wanted[rank], key=lambda i: (encoder[i], i))
    receive_counts = [0] * len(shown)
    for i in received:
        receive_counts[encoder[i]] += rows[i]
    exchange = FeatureExchange(
        send=torch.cat([torch.arange(0), *send]),
        send_counts=tuple(sum(rows[i] for i in numbers) for numbers in sent),
        receive_counts=tuple(receive_counts),
    )
    return ImageShare(
        tuple(encoded), first_rows([images[i] for i in received], merge_size), exchange
    )
