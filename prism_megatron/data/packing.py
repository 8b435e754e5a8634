"""Sequences into packed micro-batches: which go together, and the one row they make.

lengths -> plan_micro_batches -> indices per data-parallel rank and micro-batch
those sequences, this rank's ImageShare (image_plan.py) -> pack -> PackedBatch (one row of T tokens,
THD layout)
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence as Ordered

import torch
from torch import Tensor

from prism_megatron.data.image_plan import feature_rows, first_rows
from prism_megatron.data.mrope import mrope_positions
from prism_megatron.types import ImageShare, PackedBatch, Sequence, VisualInputs


def plan_micro_batches(
    lengths: Ordered[int],
    *,
    dp_size: int,
    max_tokens: int,
    multiple: int = 1,
    costs: Ordered[float] | None = None,
) -> list[list[list[int]]]:
    """Indices of the sequences of each micro-batch: plan[dp_rank][micro_batch] -> indices.

    lengths: tokens of each sequence; costs: the work of each, their lengths if not given.

    Every rank gets the same number of micro-batches, a multiple of `multiple`; no micro-batch
    exceeds `max_tokens`, and the k-th micro-batches of the ranks cost about equally much (most
    costly sequence first into the cheapest micro-batch that has room). Lists are empty where there
    are fewer sequences than micro-batches on all ranks. The plan depends on the arguments alone.
    ValueError if one sequence is longer than `max_tokens`.
    """
    costs = lengths if costs is None else costs
    for index, length in enumerate(lengths):
        if length > max_tokens:
            raise ValueError(
                f"sequence {index} has {length} tokens, a micro-batch holds "
                f"train.micro_batch_tokens={max_tokens}; raise it or lower the data's token limits"
            )
    num_micro_batches = max(1, -(-sum(lengths) // (max_tokens * dp_size * multiple))) * multiple
    while (
        bins := _cheapest_first(lengths, costs, num_micro_batches * dp_size, max_tokens)
    ) is None:
        num_micro_batches += multiple
    # Neighbours in cost run at the same time on different ranks.
    bins.sort(key=lambda members: (-sum(costs[i] for i in members), members))
    return [[sorted(bins[k]) for k in range(rank, len(bins), dp_size)] for rank in range(dp_size)]


def _cheapest_first(
    lengths: Ordered[int], costs: Ordered[float], num_bins: int, max_tokens: int
) -> list[list[int]] | None:
    """Most costly sequence first into the cheapest bin with room for it; None if one fits none."""
    heap: list[tuple[float, int]] = [(0, number) for number in range(num_bins)]
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    room = [max_tokens] * num_bins
    for index in sorted(range(len(lengths)), key=lambda i: (-costs[i], i)):
        full = []
        while heap and room[heap[0][1]] < lengths[index]:
            full.append(heapq.heappop(heap))
        if not heap:
            return None
        cost, number = heapq.heappop(heap)
        bins[number].append(index)
        room[number] -= lengths[index]
        for entry in (*full, (cost + costs[index], number)):
            heapq.heappush(heap, entry)
    return bins


def packed_length(
    sequences: Ordered[Sequence], pad_multiple: int, sequence_multiple: int = 1
) -> int:
    """Length of the row that `pack` makes: a multiple of `pad_multiple`, at least one.

    sequence_multiple: each sequence counts with its length rounded up to a multiple of it, as
    context-parallel ranks lay it out.
    """
    total = sum(_rounded(len(sequence), sequence_multiple) for sequence in sequences)
    return max(1, -(-total // pad_multiple)) * pad_multiple


def _rounded(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def pack(
    sequences: Ordered[Sequence],
    *,
    image_token_id: int,
    video_token_id: int,
    merge_size: int,
    pad_id: int,
    pad_multiple: int = 1,
    sequence_multiple: int = 1,
    pad_to: int | None = None,
    per_token: Ordered[str] = (),
    images: ImageShare | None = None,
    mrope: bool = True,
) -> PackedBatch:
    """One packed micro-batch of the sequences in the given order.

    The row is padded until its length (see packed_length) is `pad_to`, or a multiple of
    `pad_multiple`; padding is a sequence of its own at the end. No sequences make a row of padding
    alone, for a rank that has none.
    per_token: names of the sequences' values to carry; each sequence must have every one of them.
    mrope: positions as Qwen3-VL has them; False counts every token by one, images' too.
    images: this rank's share of what all ranks show; without it, what the sequences show is encoded
    here, once where several show it (same key). ValueError if a sequence's placeholder tokens and
    its images or videos do not match.
    """
    if pad_to is None:
        pad_to = packed_length(sequences, pad_multiple, sequence_multiple)
    used = sum(_rounded(len(sequence), sequence_multiple) for sequence in sequences)
    if used > pad_to:
        raise ValueError(
            f"{len(sequences)} sequences have {used} tokens, more than pad_to={pad_to}"
        )
    padding = pad_to - used
    total = sum(len(sequence) for sequence in sequences)
    length = total + padding
    pad_row = torch.full((padding,), pad_id, dtype=torch.int64)
    parts = [sequence.input_ids for sequence in sequences] + [pad_row] * bool(padding)
    sections = [sequence.section for sequence in sequences] + [0] * bool(padding)
    input_ids = torch.cat(parts)
    positions = [
        torch.arange(len(sequence)).expand(3, -1)
        if not mrope
        else mrope_positions(
            sequence.input_ids,
            [image.grid_thw for image in sequence.images],
            [video.grid_thw for video in sequence.videos],
            image_token_id=image_token_id,
            video_token_id=video_token_id,
            merge_size=merge_size,
        )
        for sequence in sequences
    ] + [torch.arange(padding).expand(3, -1)] * bool(padding)
    shown = {
        image_token_id: [image for sequence in sequences for image in sequence.images],
        video_token_id: [video for sequence in sequences for video in sequence.videos],
    }
    if images is None:
        visuals = {visual.key: visual for kind in shown.values() for visual in kind}
        images = ImageShare(tuple(visuals.values()), first_rows(visuals.values(), merge_size))
    encoded = images.encoded
    bounds = torch.tensor([0, *map(len, parts)]).cumsum(0)
    last = [len(s) - 1 if s.scored is None else s.scored for s in sequences]
    visual_index = torch.isin(input_ids, torch.tensor([*shown])).nonzero().flatten()
    return PackedBatch(
        input_ids=input_ids,
        labels=_shifted([s.input_ids for s in sequences], length, torch.int64),
        position_ids=torch.cat(positions, dim=1),
        cu_seqlens=bounds.to(torch.int32),
        scored=bounds[: len(sequences)] + torch.tensor(last, dtype=torch.int64),
        loss_mask=_shifted([s.response_mask for s in sequences], length, torch.float32),
        padding_mask=torch.arange(length) >= total,
        section=torch.cat([torch.full_like(p, k) for p, k in zip(parts, sections, strict=True)]),
        visual_index=visual_index,
        feature_index=_feature_index(input_ids[visual_index], shown, images.first, merge_size),
        pixel_values=torch.cat([v.pixel_values for v in encoded]) if encoded else None,
        grids=tuple(visual.grid_thw for visual in encoded),
        exchange=images.exchange,
        num_sequences=len(sequences),
        per_token={
            name: _shifted([s.per_token[name] for s in sequences], length, torch.float32)
            for name in per_token
        },
        noise=tuple(s.noise for s in sequences) if any(s.noise for s in sequences) else (),
        dropout=tuple(s.dropout for s in sequences) if any(s.dropout for s in sequences) else (),
        routes=_routes(sequences, length),
    )


def _shifted(values: Ordered[Tensor], length: int, dtype: torch.dtype) -> Tensor:
    """[T]: at each token the value of the next one of its sequence; 0 at ends and on padding."""
    row = torch.zeros(length, dtype=dtype)
    start = 0
    for value in values:
        row[start : start + len(value) - 1] = value[1:]
        start += len(value)
    return row


def _routes(sequences: Ordered[Sequence], length: int) -> Tensor | None:
    """[T, layers, k]: the sequences' routes, on padding the first k experts; None if none has any.

    Padding needs k different ones, too: fused top-k kernels take an expert twice where fewer are
    allowed, and experts on other ranks would wait for tokens that never come.
    """
    found = [sequence.routes for sequence in sequences if sequence.routes is not None]
    assert len(found) in (0, len(sequences)), "some sequences have routes, others not"
    if not found:
        return None
    routes = torch.cat(found)
    _, layers, choices = routes.shape
    padding = torch.arange(choices, dtype=routes.dtype).expand(length - len(routes), layers, -1)
    return torch.cat([routes, padding])


def _feature_index(
    placeholders: Tensor,
    shown: dict[int, list[VisualInputs]],
    first: dict[str, int],
    merge_size: int,
) -> Tensor:
    """[V] int64: feature row of each of the row's placeholder tokens [V]. shown: placeholder token
    -> what its tokens show, in order; first: see ImageShare."""
    index = torch.empty_like(placeholders)
    for token, kind in shown.items():
        if kind:
            index[placeholders == token] = torch.cat(
                [
                    torch.arange(feature_rows(visual, merge_size)) + first.get(visual.key, 0)
                    for visual in kind
                ]
            )
    return index
