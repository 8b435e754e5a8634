"""The Qwen3-VL vision tower on megatron.core blocks (transformers Qwen3VLVisionModel).

patches [P, D] -> linear patch embedding + interpolated positions -> blocks, attention within each
frame -> merger [P / merge^2, out_hidden] and one more merger after each deepstack layer.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from model_providers.backend import Backend
from model_providers.config import VisionConfig
from model_providers.layers import vision_block
from model_providers.packed import packed_seq_params
from model_providers.parallel import ParallelState

ROPE_THETA = 10000.0


class PatchMerger(MegatronModule):
    """Norm, then merge^2 neighbouring patches -> one token of the decoder's width.

    The deepstack mergers normalise after the patches are joined, the main merger before. The
    activation is the exact erf GELU, not the tanh form of the blocks.
    """

    def __init__(
        self,
        config: TransformerConfig,
        vision: VisionConfig,
        parallel: ParallelState,
        layers: BackendSpecProvider,
        norm_after_join: bool,
    ) -> None:
        super().__init__(config)
        self.tp_group = parallel.groups.tp
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
            tp_group=parallel.groups.tp,
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
    """See the top of the file. Every tensor-parallel rank gets all features."""

    def __init__(
        self,
        config: TransformerConfig,
        vision: VisionConfig,
        parallel: ParallelState,
        backend: Backend,
    ) -> None:
        super().__init__(config)
        self.tp_group = parallel.groups.tp
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
            pg_collection=parallel.groups_of_one_stage,
        )
        build = partial(PatchMerger, config, vision, parallel, backend.layers)
        self.merger = build(norm_after_join=False)
        self.deepstack_merger_list = ShardedModuleList(
            build(norm_after_join=True) for _ in vision.deepstack_visual_indexes
        )

    def forward(self, pixel_values: Tensor, grid_thw: Tensor) -> Tensor:
        """pixel_values [P, D], grid_thw [N, 3] -> [1 + deepstack, P / merge^2, out_hidden].

        Row 0 holds the token embeddings, the others what is added after the first decoder layers.
        """
        grids = grid_thw.tolist()
        hidden = self.patch_embed(pixel_values.to(self.patch_embed.weight.dtype))
        hidden = hidden + self._positions(grids)
        frames = torch.tensor([h * w for t, h, w in grids for _ in range(t)])
        frames = frames.to(hidden.device)
        hidden, taps = self.decoder(
            hidden.unsqueeze(1),
            attention_mask=None,
            packed_seq_params=packed_seq_params(
                F.pad(frames.cumsum(0), (1, 0)).int(),
                self._rotary(grids).to(hidden.device),
                self.backend,
            ),
            extract_layer_indices=set(self.vision.deepstack_visual_indexes),
        )
        mergers = zip(self.deepstack_merger_list, taps, strict=True)
        features = [self.merger(hidden.squeeze(1))]
        features += [merger(tap.squeeze(1)) for merger, tap in mergers]
        return torch.stack(features)

    def _coordinates(self, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Row and column of every patch of one frame, in merge-block order."""
        merge = self.vision.spatial_merge_size
        blocks = torch.arange(height * width).view(height // merge, merge, width // merge, merge)
        flat = blocks.permute(0, 2, 1, 3).flatten()
        return flat // width, flat % width

    def _rotary(self, grids: list[list[int]]) -> Tensor:
        """2-D rotary angles [P, 1, 1, head_dim]: a quarter of the pairs turns with the row, a
        quarter with the column."""
        dim = self.vision.hidden_size // self.vision.num_heads // 2
        inverse = 1.0 / ROPE_THETA ** (torch.arange(0, dim, 2, dtype=torch.float) / dim)
        angles = []
        for frames, height, width in grids:
            rows, columns = self._coordinates(height, width)
            angle = torch.cat([rows[:, None] * inverse, columns[:, None] * inverse], dim=-1)
            angles.append(angle.repeat(frames, 1))
        half = torch.cat(angles)
        return torch.cat([half, half], dim=-1)[:, None, None]

    def _positions(self, grids: list[list[int]]) -> Tensor:
        """Learned positions of a square grid, interpolated bilinearly to each image [P, hidden].

        Weights and sum stay in fp32 and are cast once, as transformers 5.x does.
        """
        side = int(self.vision.num_position_embeddings**0.5)
        table = self.pos_embed.weight
        out = []
        for frames, height, width in grids:
            rows, columns = self._coordinates(height, width)
            y = torch.linspace(0, side - 1, height)[rows].to(table.device)
            x = torch.linspace(0, side - 1, width)[columns].to(table.device)
            top, left = y.long(), x.long()
            bottom, right = (top + 1).clamp(max=side - 1), (left + 1).clamp(max=side - 1)
            dy, dx = (y - top)[:, None], (x - left)[:, None]
            position = (
                (1 - dy) * (1 - dx) * table[top * side + left]
                + (1 - dy) * dx * table[top * side + right]
                + dy * (1 - dx) * table[bottom * side + left]
                + dy * dx * table[bottom * side + right]
            )
            out.append(position.to(table.dtype).repeat(frames, 1))
        return torch.cat(out)
