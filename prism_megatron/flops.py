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

from model_providers.architecture import Qwen3VLConfig

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
    squares = sum(length**2 for length in lengths)
    linear, experts, attention = layer_flops(config, sum(lengths), squares)
    of_head = 2 * sum(lengths) * config.hidden_size * config.vocab_size
    return Flops(
        text=3.0 * (config.num_layers * (linear + experts) + head * of_head),
        attention=3.0 * config.num_layers * attention,
        vision=3.0 * sum(t * sum(frame_flops(config, h * w)) for t, h, w in grids),
    )


def layer_flops(config: Qwen3VLConfig, tokens: float, squares: float) -> tuple[float, float, float]:
    """Forward, of one decoder layer: linear layers without experts, experts, attention; squares:
    sum of the sequences' squared lengths."""
    experts = 3 * config.top_k * config.hidden_size * config.moe_intermediate_size
    attention = 2 * config.num_heads * config.head_dim * squares
    return 2 * tokens * (config.token_weights - experts), 2 * tokens * experts, attention


def frame_flops(config: Qwen3VLConfig, patches: int) -> tuple[float, float]:
    """Forward, of a frame in the tower: linear layers with the mergers, attention."""
    vision = config.vision
    hidden = vision.hidden_size
    block = 4 * hidden**2 + 2 * hidden * vision.intermediate_size
    joined = hidden * vision.spatial_merge_size**2
    mergers = (1 + config.num_deepstack) * (joined**2 + joined * vision.out_hidden_size)
    linear = patches * (vision.patch_dim * hidden + vision.depth * block)
    linear += patches / vision.spatial_merge_size**2 * mergers
    return 2.0 * linear, 4.0 * vision.depth * hidden * patches**2
