"""Memory of one GPU in training, by the sizes of model and layout.

    weights       in BF16 (2 bytes), with gradients in fp32 (4) where they are trained
    optimizer     fp32 weights and moments (12 bytes, or 8 with BF16 moments) of what is trained,
                  spread over data-parallel ranks
    activations   what a layer keeps of each token for its backward pass, and the logits

The first two are exact but for norms and padding. Activations are an estimate: attention as flash
attention keeps it, in BF16, without the vision tower and what kernels need besides. Megatron's
pipeline schedules hold the activations of as many micro-batches as there are stages, each for its
share of the layers. The numbers are those of the GPU that has most.
"""

from __future__ import annotations

from dataclasses import dataclass

from model_providers.config import Qwen3VLConfig, Recompute, stage_layers
from model_providers.parallel import Layout

WEIGHT, GRADIENT = 2, 4


@dataclass(frozen=True)
class Parameters:
    """Weights by part of the model."""

    embedding: int
    head: int
    """The language head, unless it is the embedding."""
    layer: int
    """One decoder layer without its experts."""
    experts: int
    """The experts of one decoder layer."""
    layers: int
    vision: int
    """The vision tower without its mergers."""
    mergers: int

    @property
    def total(self) -> int:
        decoder = self.layers * (self.layer + self.experts)
        return self.embedding + self.head + decoder + self.vision + self.mergers


def parameters(config: Qwen3VLConfig) -> Parameters:
    """Counts of a language model, as transformers has them (Qwen3VLForConditionalGeneration)."""
    hidden, vision = config.hidden_size, config.vision
    width = vision.hidden_size
    block = 4 * (width**2 + width) + 2 * width * vision.intermediate_size
    block += vision.intermediate_size + width + 4 * width
    joined = width * vision.spatial_merge_size**2
    merger = joined**2 + joined + joined * vision.out_hidden_size + vision.out_hidden_size
    # the last merger's norm is before patches are joined, those of deepstack after that
    norms = 2 * width + config.num_deepstack * 2 * joined
    # the norms of queries and keys, and of what goes into attention and MLP
    layer = config.token_weights + 2 * config.head_dim + 2 * hidden
    layer -= config.top_k * 3 * hidden * config.moe_intermediate_size
    return Parameters(
        embedding=config.vocab_size * hidden,
        # the decoder's last norm goes with it
        head=hidden + (0 if config.tie_word_embeddings else config.vocab_size * hidden),
        layer=layer,
        experts=config.num_experts * 3 * hidden * config.moe_intermediate_size,
        layers=config.num_layers,
        vision=(vision.patch_dim + 1 + vision.num_position_embeddings) * width
        + vision.depth * block,
        mergers=(1 + config.num_deepstack) * merger + norms,
    )


def state_bytes(
    config: Qwen3VLConfig,
    layout: Layout,
    world: int,
    *,
    frozen: frozenset[str] = frozenset(),
    moment_bytes: int = 4,
    score: bool = False,
) -> tuple[float, float]:
    """Bytes of weights with gradients, and of the optimizer.

    frozen: of "language", "vision", "mergers"; score: a discriminator, without a language head.
    """
    count = parameters(config)
    shard = layout.tensor * layout.data(world) * layout.context
    expert_shard = layout.expert * layout.expert_tensor * layout.expert_data(world)
    weights, optimizer = [], []
    for stage in range(layout.pipeline):
        first, last = stage == 0, stage == layout.pipeline - 1
        layers = _layers(config, layout, stage)
        head = count.head
        if config.tie_word_embeddings and layout.pipeline > 1:
            head += count.embedding  # a copy of its own
        dense = {
            "language": layers * count.layer
            + first * count.embedding
            + (last and not score) * head,
            "vision": first * count.vision,
            "mergers": first * count.mergers,
        }
        trained = sum(part for name, part in dense.items() if name not in frozen)
        experts = layers * count.experts
        trained_experts = 0 if "language" in frozen else experts
        weights.append(
            (WEIGHT * sum(dense.values()) + GRADIENT * trained) / layout.tensor
            + (WEIGHT * experts + GRADIENT * trained_experts)
            / (layout.expert * layout.expert_tensor)
        )
        optimizer.append(
            (4 + 2 * moment_bytes) * (trained / shard + trained_experts / expert_shard)
        )
    return max(weights), max(optimizer)


def activation_bytes(
    config: Qwen3VLConfig,
    layout: Layout,
    tokens: int,
    recompute: Recompute,
    *,
    score: bool = False,
) -> float:
    """Bytes of activations for micro-batches of `tokens`, over all context-parallel ranks."""
    tokens_here = tokens / layout.context / (layout.tensor if layout.sequence_parallel else 1)
    hidden = config.hidden_size
    queries = config.num_heads * config.head_dim
    keys = config.num_kv_heads * config.head_dim
    # inputs of norms and projections, queries, keys, values and the attention's result
    attention = 2 * hidden + 2 * queries + 2 * keys
    if config.num_experts:
        # each copy of a token: what goes in, up and gate, their product, what comes out
        mlp = config.top_k * (2 * hidden + 3 * config.moe_intermediate_size) + 2 * hidden
    else:
        mlp = 2 * hidden + 3 * config.intermediate_size
    if recompute.granularity == "selective":
        if {"mlp", "moe"} & set(recompute.modules):
            mlp = hidden
        if "core_attn" in recompute.modules:
            attention -= queries
        if "layernorm" in recompute.modules:
            attention -= hidden
        if "moe_act" in recompute.modules:
            mlp -= config.top_k * config.moe_intermediate_size
    kept = attention + mlp
    logits = 0.0
    if not score:
        # in BF16, and in fp32 what the loss keeps of them
        logits = (2 + 4) * tokens / layout.context / layout.tensor * config.vocab_size
    most, chunks = 0.0, layout.virtual_pipeline
    for stage in range(layout.pipeline):
        layers = _layers(config, layout, stage)
        whole = 0
        if recompute.granularity == "full":
            whole = min(layers, recompute.layers or layers)
        per_layer = (layers - whole) * kept + whole * hidden
        before_end = layout.pipeline - 1 - stage
        in_flight = before_end + 1
        if chunks > 1:
            # chunks that the interleaved schedule has computed forward before the first backward
            in_flight = (2 * before_end + (chunks - 1) * layout.pipeline + 1) / chunks
        # the layer that is being computed again
        again = kept if whole else 0
        own = 2.0 * tokens_here * (per_layer * in_flight + again)
        most = max(most, own + (logits if before_end == 0 else 0))
    return most


def _layers(config: Qwen3VLConfig, layout: Layout, stage: int) -> int:
    """Decoder layers of a stage."""
    chunks = range(layout.virtual_pipeline)
    return sum(len(stage_layers(config, layout, stage, chunk)) for chunk in chunks)
