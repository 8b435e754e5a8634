"""The Qwen3-VL vision tower on megatron.core blocks (transformers Qwen3VLVisionModel).

patches [P, D] -> linear patch embedding + interpolated positions -> blocks, attention within each
frame -> merger [P / merge^2, out_hidden] and one more merger after each deepstack layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache, partial
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from model_providers.architecture import VisionConfig
from model_providers.backend import Backend
from model_providers.layers import vision_block
from model_providers.packed import packed_seq_params
from model_providers.parallel import ParallelState

ROPE_THETA = 10000.0

Grid = tuple[int, int, int]
"""Frames, rows and columns of an image or video, in patches."""


class PatchMerger(MegatronModule):
    """Norm, then merge^2 neighbouring patches -> one token of the decoder's width.

    The deepstack mergers normalise after the patches are joined, the main merger before. The
    activation is the exact erf GELU, not the tanh form of the blocks.
    """

    def __init__(
        self,
        config: TransformerConfig,
        vision: VisionConfig,
        group: ProcessGroup,
        layers: BackendSpecProvider,
        norm_after_join: bool,
    ) -> None:
        super().__init__(config)
        self.tp_group = group
        self.joined = vision.hidden_size * vision.spatial_merge_size**2
        self.norm_after_join = norm_after_join
        self.norm = nn.LayerNorm(
            self.joined if norm_after_join else vision.hidden_size,
            eps=1e-6,
            dtype=config.params_dtype,
        )
        shared = dict(
            config=config,
            init_method=config.init_method,
            bias=True,
            skip_bias_add=False,
            is_expert=False,
            tp_group=group,
        )
        self.linear_fc1 = layers.column_parallel_linear()(
            self.joined, self.joined, gather_output=False, **shared
        )
        self.linear_fc2 = layers.row_parallel_linear()(
            self.joined, vision.out_hidden_size, input_is_parallel=True, **shared
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """[P, hidden] -> [P / merge^2, out_hidden]."""
        if not self.norm_after_join:
            hidden = self.norm(hidden)
        hidden = hidden.reshape(-1, self.joined)
        if self.norm_after_join:
            hidden = self.norm(hidden)
        return self.linear_fc2(F.gelu(self.linear_fc1(hidden)[0]))[0]


class ShardedModuleList(nn.ModuleList):
    """A ModuleList whose members say themselves how they are sharded in a checkpoint."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: Any = None
    ) -> dict[str, Any]:
        state: dict[str, Any] = {}
        for name, module in self.named_children():
            state |= module.sharded_state_dict(f"{prefix}{name}.", sharded_offsets, metadata)
        return state


class VisionModel(MegatronModule):
    """See the top of the file. Tensor-parallel ranks split it and get all features each, or each
    has all of it, for images of its own (Layout.vision)."""

    def __init__(
        self,
        config: TransformerConfig,
        vision: VisionConfig,
        parallel: ParallelState,
        backend: Backend,
    ) -> None:
        super().__init__(config)
        groups = parallel.vision_groups
        self.tp_group = groups.tp
        self.tensor_replica = parallel.tensor_rank if parallel.layout.vision == "replicated" else 0
        self.vision = vision
        self.backend = backend
        self.patch_embed = nn.Linear(vision.patch_dim, vision.hidden_size, dtype=backend.dtype)
        self.pos_embed = nn.Embedding(
            vision.num_position_embeddings, vision.hidden_size, dtype=backend.dtype
        )
        self.decoder = TransformerBlock(
            config,
            vision_block(config, backend.layers),
            post_layer_norm=False,
            pg_collection=groups,
        )
        build = partial(PatchMerger, config, vision, groups.tp, backend.layers)
        self.merger = build(norm_after_join=False)
        self.deepstack_merger_list = ShardedModuleList(
            build(norm_after_join=True) for _ in vision.deepstack_visual_indexes
        )
        if parallel.layout.vision == "replicated":
            for parameter in self.parameters():
                # linear layers say so of all that they could split; the gradient norm would count
                # the copies
                parameter.tensor_model_parallel = False  # type: ignore[attr-defined]

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: Any = None
    ) -> dict[str, Any]:
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if self.tensor_replica:
            for entry in state.values():
                # pipeline, tensor, data: the first tensor-parallel rank's copies are written
                pipeline, _, data = entry.replica_id
                entry.replica_id = (pipeline, self.tensor_replica, data)
        return state

    def forward(self, pixel_values: Tensor, grids: Sequence[Grid]) -> Tensor:
        """pixel_values [P, D], grids (t, h, w) -> [1 + deepstack, P / merge^2, out_hidden].

        Row 0 holds the token embeddings, the others what is added after the first decoder layers.
        """
        corners, weights, coordinates = self._patches(grids)
        hidden = self.patch_embed(pixel_values.to(self.patch_embed.weight.dtype))
        hidden = hidden + self._positions(corners, weights)
        frames = [height * width for count, height, width in grids for _ in range(count)]
        cu_seqlens = torch.tensor([0, *accumulate(frames)], dtype=torch.int32)
        hidden, taps = self.decoder(
            hidden.unsqueeze(1),
            attention_mask=None,
            packed_seq_params=packed_seq_params(
                cu_seqlens, self._rotary(coordinates), self.backend
            ),
            extract_layer_indices=set(self.vision.deepstack_visual_indexes),
        )
        mergers = zip(self.deepstack_merger_list, taps, strict=True)
        features = [self.merger(hidden.squeeze(1))]
        features += [merger(tap.squeeze(1)) for merger, tap in mergers]
        return torch.stack(features)

    def _patches(self, grids: Sequence[Grid]) -> list[Tensor]:
        """The tables of `frame_patches` for all P patches, frame after frame, on the device."""
        side = math.isqrt(self.vision.num_position_embeddings)
        frames = [
            frame_patches(height, width, self.vision.spatial_merge_size, side)
            for count, height, width in grids
            for _ in range(count)
        ]
        return [
            self.backend.to_device(torch.cat(table, dim=1)) for table in zip(*frames, strict=True)
        ]

    def _rotary(self, coordinates: Tensor) -> Tensor:
        """2-D rotary angles [P, 1, 1, head_dim] of row and column [2, P]: a quarter of the pairs
        turns with the row, a quarter with the column."""
        dim = self.vision.hidden_size // self.vision.num_heads // 2
        exponent = torch.arange(0, dim, 2, dtype=torch.float, device=coordinates.device) / dim
        angles = coordinates.float()[..., None] * (1.0 / ROPE_THETA**exponent)
        half = torch.cat([angles[0], angles[1]], dim=-1)
        return torch.cat([half, half], dim=-1)[:, None, None]

    def _positions(self, corners: Tensor, weights: Tensor) -> Tensor:
        """Learned positions of a square grid, interpolated bilinearly to each frame [P, hidden].

        Weights and sum stay in fp32 and are cast once, as transformers 5.x does.
        """
        table = self.pos_embed.weight.float()
        position = weights[0, :, None] * table[corners[0]]
        for corner, weight in zip(corners[1:], weights[1:], strict=True):
            position = position + weight[:, None] * table[corner]
        return position.to(self.pos_embed.weight.dtype)


@lru_cache(maxsize=256)
def frame_patches(height: int, width: int, merge: int, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where the patches of a frame lie, in merge-block order; host tensors, kept by size.

    Returns the four entries of the side x side table of learned positions around each patch
    [4, h*w] int64, their weights [4, h*w] fp32, and its row and column [2, h*w] int64.
    """
    blocks = torch.arange(height * width).view(height // merge, merge, width // merge, merge)
    order = blocks.permute(0, 2, 1, 3).flatten()
    rows, columns = order // width, order % width
    y = torch.linspace(0, side - 1, height)[rows]
    x = torch.linspace(0, side - 1, width)[columns]
    top, left = y.long(), x.long()
    bottom, right = (top + 1).clamp(max=side - 1), (left + 1).clamp(max=side - 1)
    dy, dx = y - top, x - left
    corners = [top * side + left, top * side + right, bottom * side + left, bottom * side + right]
    weights = [(1 - dy) * (1 - dx), (1 - dy) * dx, dy * (1 - dx), dy * dx]
    return torch.stack(corners), torch.stack(weights), torch.stack([rows, columns])
