"""Context parallelism: how the ranks of a group share one packed row.

Every sequence is padded to a multiple of 2 * C tokens and cut into 2 * C chunks, of which rank r of
C holds the chunks r and 2 * C - 1 - r, so that causal attention is equal work for all. That is
Transformer Engine's layout of packed sequences. Two ranks share a sequence of 7 tokens like this:

    a b c d e f g .    rank 0: a b g .    rank 1: c d e f

Batches are whole and without this padding on every rank. The model takes the tokens of its rank,
and what it computes for them is gathered into the batch's row again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor
from torch.distributed import ProcessGroup

from model_providers.backend import Backend


def sequence_multiple(ranks: int) -> int:
    """What the length of every sequence is rounded up to a multiple of."""
    return 2 * ranks if ranks > 1 else 1


def owner(offset: Tensor, chunk: Tensor, ranks: int) -> tuple[Tensor, Tensor]:
    """Of tokens at `offset` in sequences cut into chunks of `chunk` tokens: the rank that holds
    each, and the offset there."""
    number, inside = offset // chunk, offset % chunk
    second = number >= ranks
    return torch.where(second, 2 * ranks - 1 - number, number), inside + chunk * second


@dataclass(frozen=True)
class ContextShare:
    """One rank's share of a row of T tokens: `size` of them, padding included.

    cu_seqlens [S+1] int32    boundaries of the padded sequences, over all ranks; on the host
    place      [T] int64      each token's position when the ranks' shares are laid end to end; on
                              the host
    tokens     [size] int64   the row's position of each of this rank's tokens; T on padding
    """

    cu_seqlens: Tensor
    place: Tensor
    tokens: Tensor
    size: int
    group: ProcessGroup
    backend: Backend

    @classmethod
    def of(cls, cu_seqlens: Tensor, group: ProcessGroup, backend: Backend) -> ContextShare:
        """cu_seqlens [S+1] int32, on the host, of a row without the padding of single sequences."""
        ranks = group.size()
        row = torch.arange(int(cu_seqlens[-1]))
        if ranks == 1:
            return cls(cu_seqlens, row, row, len(row), group, backend)
        parts = sequence_multiple(ranks)
        lengths = cu_seqlens.diff().long()
        chunks = (lengths + parts - 1) // parts
        ends = (chunks * parts).cumsum(0)
        starts = ends - chunks * parts
        size = int(ends[-1]) // ranks
        number = torch.repeat_interleave(lengths)
        offset = row - cu_seqlens[number]
        rank, local = owner(offset, chunks[number], ranks)
        place = rank * size + starts[number] // ranks + local
        tokens = row.new_full((ranks * size,), len(row)).scatter(0, place, row)
        return cls(
            cu_seqlens=torch.nn.functional.pad(ends, (1, 0)).int(),
            place=place,
            tokens=backend.to_device(tokens.view(ranks, size)[group.rank()]),
            size=size,
            group=group,
            backend=backend,
        )

    def take(self, values: Tensor, padding: float | Tensor) -> Tensor:
        """Values of the row [..., T] -> those of this rank's tokens [..., size]; padding: those of
        a token that is padding, [...] or fewer axes, on their device."""
        if self.group.size() == 1:
            return values
        shape = values.shape[:-1]
        if isinstance(padding, Tensor):
            last = padding.to(values.dtype).expand(shape)
        else:
            # on the device: a scalar that is copied there would have the host wait
            last = values.new_full(shape, padding)
        return torch.cat([values, last.unsqueeze(-1)], dim=-1)[..., self.tokens]

    def find(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Positions in the row [V], on the host -> the rank that holds each, and where there."""
        place = self.place[positions]
        return place // self.size, place % self.size

    def gather(self, values: Tensor) -> Tensor:
        """Values of this rank's tokens [size, ...] -> those of the row [T, ...] on every rank.

        Every rank computes the same loss from the row, so backward gives each rank the gradient of
        its own values, without a sum over the ranks.
        """
        if self.group.size() == 1:
            return values
        whole = gather_from_sequence_parallel_region(
            values, tensor_parallel_output_grad=False, group=self.group
        )
        return whole[self.backend.to_device(self.place)]
