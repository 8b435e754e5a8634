"""Each distinct image of the data-parallel ranks' k-th micro-batches is encoded once.

    images of all ranks' k-th rows
        | every rank plans the same (prism_megatron.data.image_plan), pixels do not travel
        v
    the images that this rank encodes --vision tower--> their features [L, V_encoded, h]
                                                            | rows that other ranks show
                                                            v
    the images that this rank shows <-----exchange----- their features [L, V, h]

Backward sends the gradients the other way and sums those of several ranks. Losses are divided by
counts over the whole step and gradients only summed over the ranks, so it does not matter on which
of them the tower gets its gradient.

The exchange is one collective of the data- and context-parallel ranks, in which a rank that has
nothing to send or to receive takes part, too. Where every image is encoded by the one rank that
shows it, all ranks know that and there is no exchange. A rank is a group of tensor-parallel ranks
here, which split the tower's work on each image. With a replicated tower each of these is a rank of
its own, and all of a group show the same images.
"""

from __future__ import annotations

from collections.abc import Sequence as Ordered
from typing import Protocol

from megatron.core.tensor_parallel import all_to_all
from torch import Tensor
from torch.distributed import ProcessGroup

from model_providers.backend import Backend


class FeatureExchange(Protocol):
    """What one rank sends and receives; see prism_megatron.types.FeatureExchange."""

    send: Tensor
    send_counts: Ordered[int]
    receive_counts: Ordered[int]


def exchange(
    features: Tensor, plan: FeatureExchange, group: ProcessGroup, backend: Backend
) -> Tensor:
    """Features encoded on this rank [L, V_encoded, h] -> those of the images that it shows
    [L, V, h], in the order of the ranks of `group` that encoded them."""
    # an index with repeated rows, whose backward sums their gradients
    sent = features.transpose(0, 1)[backend.to_device(plan.send)]
    received = all_to_all(group, sent, [*plan.receive_counts], [*plan.send_counts])
    return received.transpose(0, 1)
