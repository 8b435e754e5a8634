"""Interleaved-MRoPE position ids of one sequence (Qwen3-VL)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Grid = tuple[int, int, int]


def mrope_positions(
    input_ids: Tensor,
    image_grids: Sequence[Grid],
    video_grids: Sequence[Grid],
    *,
    image_token_id: int,
    video_token_id: int,
    merge_size: int,
) -> Tensor:
    """Position ids (t, h, w) of every token: [3, L] int64 for input_ids [L] int64.

    Text counts up by one on all three axes. The tokens of an image share the position p that
    follows the text before them as t, and have p + row and p + column as h and w; after the image
    the text goes on at p + max(rows, columns), not after its number of tokens. Grids are (t, h, w)
    in patches, merge_size**2 patches make a token. Every frame of a video stands alone between its
    timestamps, so a grid (t, h, w) is t spans of (1, h, w).
    Same as Qwen3VLModel.get_rope_index of transformers for one sequence; ValueError if the
    placeholder tokens and the grids do not match.
    """
    frames = [(1, h, w) for t, h, w in video_grids for _ in range(t)]
    spans = _visual_spans(
        input_ids, {image_token_id: list(image_grids), video_token_id: frames}, merge_size
    )
    positions = torch.empty(3, len(input_ids), dtype=torch.int64)
    start = position = 0
    for span_start, grid in spans:
        positions[:, start:span_start] = torch.arange(position, position + span_start - start)
        position += span_start - start
        t, h, w = grid[0], grid[1] // merge_size, grid[2] // merge_size
        start = span_start + t * h * w
        axes = torch.meshgrid(torch.arange(t), torch.arange(h), torch.arange(w), indexing="ij")
        positions[:, span_start:start] = torch.stack(axes).flatten(1) + position
        position += max(h, w)
    positions[:, start:] = torch.arange(position, position + len(input_ids) - start)
    return positions


def _visual_spans(
    input_ids: Tensor, grids: dict[int, list[Grid]], merge_size: int
) -> list[tuple[int, Grid]]:
    """(first index, grid) of every image or video frame, in token order."""
    ids = input_ids.tolist()
    spans = []
    unused = {token: iter(values) for token, values in grids.items()}
    index = 0
    while index < len(ids):
        token = ids[index]
        if token not in unused:
            index += 1
            continue
        grid = next(unused[token], None)
        if grid is None:
            raise ValueError(
                f"placeholder {token} at index {index}: all {len(grids[token])} grids are used up"
            )
        end = index + grid[0] * grid[1] * grid[2] // merge_size**2
        if ids[index:end] != [token] * (end - index):
            raise ValueError(
                f"grid {grid} needs {end - index} placeholders {token} at index {index}"
            )
        spans.append((index, grid))
        index = end
    for token, rest in unused.items():
        if leftover := len(list(rest)):
            raise ValueError(
                f"{leftover} of {len(grids[token])} grids have no placeholders {token}"
            )
    return spans
