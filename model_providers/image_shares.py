"""Each distinct image of a micro-batch is encoded once, by one of the ranks that need its features.

    images --share_out--> each rank's own --encode--> its features --gathered--> all features

Backward sums the ranks' gradients of a feature and gives them to the rank that encoded it. A rank
without an image takes part in the collectives alone.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Ordered
from itertools import accumulate
from math import prod

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor
from torch.distributed import ProcessGroup

from model_providers.vision import Grid


def share_out(costs: Ordered[float], ranks: int) -> list[list[int]]:
    """Image numbers of each rank, ascending: the most expensive image first, to the rank with the
    least work. The same on every rank, as it depends on the arguments alone."""
    work = [0.0] * ranks
    shares: list[list[int]] = [[] for _ in range(ranks)]
    for image in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        rank = work.index(min(work))
        work[rank] += costs[image]
        shares[rank].append(image)
    return [sorted(share) for share in shares]


def encode_once(
    encode: Callable[[Tensor, Ordered[Grid]], Tensor],
    pixel_values: Tensor,
    grids: Ordered[Grid],
    *,
    costs: Ordered[float],
    rows: Ordered[int],
    nothing: Tensor,
    group: ProcessGroup,
) -> Tensor:
    """Features [L, V, h] of all N images, equal on every rank of `group`, which all have the same
    images.

    encode: pixel_values [P, D] and grids (t, h, w) of some images -> their features [L, rows, h];
    costs, rows: the work and the feature rows of each image; nothing: features of no image
    [L, 0, h], requiring a gradient if those of an image do.
    """
    if group.size() == 1:
        return encode(pixel_values, grids)
    shares = share_out(costs, group.size())
    own = shares[group.rank()]
    if own:
        patches = pixel_values.split([prod(grid) for grid in grids])
        features = encode(torch.cat([patches[i] for i in own]), [grids[i] for i in own])
    else:
        features = nothing
    # collectives want equal sizes
    longest = max(sum(rows[i] for i in share) for share in shares)
    features = F.pad(features.transpose(0, 1), (0, 0, 0, 0, 0, longest - features.shape[1]))
    gathered = gather_from_sequence_parallel_region(features.contiguous(), group=group)
    first = {
        image: rank * longest + start
        for rank, share in enumerate(shares)
        for image, start in zip(share, accumulate([0, *(rows[i] for i in share)]), strict=False)
    }
    index = torch.cat([torch.arange(count) + first[i] for i, count in enumerate(rows)])
    return gathered[index.to(gathered.device)].transpose(0, 1)
