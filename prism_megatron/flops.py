"""Floating-point operations of a training step, by the model's matrix products.

    text       2 * weights of the decoder's linear layers and of the language head, a token
    attention  4 * heads * head_dim * L^2 / 2, a causal sequence of L tokens and layer
    vision     2 * weights of the tower's and the mergers' linear layers, a patch;
               4 * hidden * P^2, a frame of P patches and block

These are forward counts; a training step takes three times as many, whatever is computed anew.
Norms, rotary embeddings, activations and the optimizer are left out, as is usual for MFU.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from model_providers.config import Qwen3VLConfig

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Flops:
    """Operations by part."""

    text: float
    attention: float
    vision: float

    @property
    def total(self) -> float:
        return self.text + self.attention + self.vision


def training_flops(
    config: Qwen3VLConfig, lengths: Iterable[int], grids: Iterable[Grid], head: bool = True
) -> Flops:
    """Operations of forward and backward over sequences of `lengths` tokens and over distinct
    images and videos of `grids` (t, h, w) patches, with nothing frozen."""
    lengths, grids = list(lengths), list(grids)
    attention = sum(2 * config.num_heads * config.head_dim * length**2 for length in lengths)
    return Flops(
        text=6.0
        * sum(lengths)
        * (
            config.num_layers * config.token_weights + head * config.hidden_size * config.vocab_size
        ),
        attention=3.0 * config.num_layers * attention,
        vision=3.0 * sum(t * _frame(config, h * w) for t, h, w in grids),
    )


def _frame(config: Qwen3VLConfig, patches: int) -> float:
    vision = config.vision
    hidden = vision.hidden_size
    block = 4 * hidden**2 + 2 * hidden * vision.intermediate_size
    joined = hidden * vision.spatial_merge_size**2
    mergers = (1 + config.num_deepstack) * (joined**2 + joined * vision.out_hidden_size)
    linear = patches * (vision.patch_dim * hidden + vision.depth * block)
    linear += patches / vision.spatial_merge_size**2 * mergers
    return 2.0 * linear + 4.0 * vision.depth * hidden * patches**2
