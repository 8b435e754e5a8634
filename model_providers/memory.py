"""Memory of one GPU in training, by the sizes of model and layout.

    weights      in BF16 (2 bytes)
    gradients    in fp32 (4) of what is trained
    fp8          what Transformer Engine keeps of the decoder's matrices but experts to compute with
                 (2): as they are and transposed; with fp8_param_gather the first are the weights
                 (1 each). Experts are cast whenever they are used
    optimizer    fp32 weights and moments (12 bytes, or 8 with BF16 moments) of what is trained,
                 spread over data-parallel ranks; a replicated tower has it, as the first two, on
                 all tensor-parallel ranks. With offload it lies in host memory, and an update has
                 three pieces of it at a time
    language     what a decoder layer keeps of each token for its backward pass
    head         logits in BF16, whose gradient takes their place, and the gradient of the head
                 before it is added to the others
    vision       what the tower keeps of each patch
    rounding     with fp8_param_gather a BF16 copy (2) of the main weights that are rounded, all at
                 once, or with offload a piece's, in the update

The first four are exact but for norms and padding. Activations are counted tensor by tensor as
Transformer Engine keeps them, attention as flash attention does. Megatron's pipeline schedules hold
those of as many micro-batches as there are stages, each for its share of the layers.
tests/unit/test_measured_memory.py compares the sums with measured peaks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

from model_providers.architecture import Qwen3VLConfig
from model_providers.config import Recompute, stage_layers
from model_providers.parallel import Layout

WEIGHT, GRADIENT = 2, 4
BUFFERS = 1.84e9
"""Bytes that torch allocates besides: Transformer Engine's and cuBLAS's workspaces, the batch. From
a step of 8B on two H200s whose peak was in the update, where nothing else is unknown."""
CONTEXT = 1.5e9
"""Bytes of a process that torch does not count: CUDA's context and NCCL's buffers."""
ENGINE_ASLEEP = 1.7e9
"""Bytes that a sleeping server keeps on each of its GPUs. With CONTEXT what is in use beside a tiny
model in docs/results/h200/sync-dense.json: 139.8 GiB less 136.8 free."""
SYNC_BUCKET = 2**30
"""Bytes of the weights that go to an engine at a time, unless a single tensor has more."""
PIECE = 2**26
"""Parameters whose state is on the device at a time where it lies in host memory, unless a single
one is larger."""
NO_RECOMPUTE = Recompute()


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU by part; see the top of the file."""

    weights: float
    gradients: float
    fp8: float
    optimizer: float
    language: float
    head: float
    vision: float
    rounding: float
    pieces: float
    """Of the optimizer's part, what an update has at a time where it lies in host memory."""

    @property
    def activations(self) -> float:
        return self.language + self.head + self.vision

    def held(self, offload: bool) -> float:
        """What is there all the time; offload: without the optimizer's part."""
        return self.weights + self.gradients + self.fp8 + (0 if offload else self.optimizer)

    def passing(self, offload: bool) -> float:
        """What is there besides at the worst moment, of the passes or of the update."""
        return max(self.activations, self.pieces if offload else self.rounding)

    def peak(self, offload: bool = False) -> float:
        """Most that torch allocates at a time for this model."""
        return BUFFERS + self.held(offload) + self.passing(offload)


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


@cache
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


def training_bytes(
    config: Qwen3VLConfig,
    layout: Layout,
    world: int,
    *,
    tokens: int,
    patches: float = 0,
    micro_batches: int | None = None,
    recompute: Recompute = NO_RECOMPUTE,
    offload_layers: int = 0,
    frozen: frozenset[str] = frozenset(),
    moment_bytes: int = 4,
    fp8: bool = False,
    fp8_param_gather: bool = False,
    score: bool = False,
    offload: bool = False,
) -> Memory:
    """Bytes of the pipeline stage that needs most.

    tokens: of a micro-batch, over all context-parallel ranks; patches: that one rank encodes for
    it; micro_batches: of a step, where these are fewer than what a schedule can hold; frozen: of
    "language", "vision", "mergers"; score: a discriminator, without a language head.
    """
    stages = [
        _stage_bytes(
            config,
            layout,
            world,
            stage,
            tokens=tokens,
            patches=patches,
            micro_batches=micro_batches,
            recompute=recompute,
            offload_layers=offload_layers,
            frozen=frozen,
            moment_bytes=moment_bytes,
            fp8=fp8,
            fp8_param_gather=fp8_param_gather,
            score=score,
        )
        for stage in stages_that_differ(layout)
    ]
    return max(stages, key=lambda stage: stage.peak(offload))


def sync_bytes(config: Qwen3VLConfig, layout: Layout) -> float:
    """What a weight sync into engines on the trainers' GPUs takes of each: two buckets that are
    lent in turn and, unless a rank has all weights, what it sends and gets of one
    (weight_plan.py)."""
    # experts are cut
    largest = WEIGHT * parameters(config).embedding
    split = layout.tensor * layout.pipeline * layout.expert * layout.expert_tensor > 1
    return max(SYNC_BUCKET, largest) * (4 if split else 2)


def images_of_a_rank(layout: Layout, images: float) -> float:
    """Images that a rank encodes, of `images` alike in a data-parallel rank's row. A replicated
    tower has whole ones on each of its many ranks, and the others wait for the rank with most."""
    each = images / (layout.context * layout.towers)
    # but for what the division leaves behind
    return math.ceil(each - 1e-6) if layout.vision == "replicated" else each


def stages_that_differ(layout: Layout) -> list[int]:
    """Stages among which the slowest and the largest are: those between the second and the last
    are like the second, and hold fewer micro-batches."""
    return sorted({0, min(1, layout.pipeline - 1), layout.pipeline - 1})


def _stage_bytes(
    config: Qwen3VLConfig,
    layout: Layout,
    world: int,
    stage: int,
    *,
    tokens: int,
    patches: float,
    micro_batches: int | None,
    recompute: Recompute,
    offload_layers: int,
    frozen: frozenset[str],
    moment_bytes: int,
    fp8: bool,
    fp8_param_gather: bool,
    score: bool,
) -> Memory:
    count = parameters(config)
    first, last = stage == 0, stage == layout.pipeline - 1
    layers = num_stage_layers(config, layout, stage)
    head = count.head
    if config.tie_word_embeddings and layout.pipeline > 1:
        head += count.embedding  # a copy of its own
    language_weights = layers * count.layer + first * count.embedding
    dense = {
        "language": (language_weights + (last and not score) * head) / layout.tensor,
        "vision": first * count.vision / layout.vision_tensor,
        "mergers": first * count.mergers / layout.vision_tensor,
    }
    trained = sum(part for name, part in dense.items() if name not in frozen)
    experts = layers * count.experts
    trained_experts = 0 if "language" in frozen else experts
    ranks = layout.data(world) * layout.context
    split = layout.expert * layout.expert_tensor
    expert_shard = split * layout.expert_data(world)
    own, own_experts = sum(dense.values()), experts / split
    chunks = layout.virtual_pipeline
    before_end = layout.pipeline - 1 - stage
    # micro-batches of each chunk that are computed forward before the first one's backward pass
    warm_up = before_end + 1 if chunks == 1 else 2 * before_end + (chunks - 1) * layout.pipeline + 1
    in_flight = [_of_chunk(warm_up, layout, chunk, micro_batches) for chunk in range(chunks)]
    kept, whole = token_bytes(config, recompute, fp8)
    here = tokens / layout.context / (layout.tensor if layout.sequence_parallel else 1)
    language, recomputed = 0.0, False
    for chunk, held in enumerate(in_flight):
        in_chunk = len(stage_layers(config, layout, stage, chunk))
        full = 0
        if recompute.granularity == "full":
            full = min(in_chunk, recompute.layers or in_chunk)
        recomputed |= bool(full)
        # with layers in host memory there is a single stage with a single chunk
        kept_here = in_chunk - full - offload_layers
        language += here * held * (kept_here * kept + full * whole)
    # the layer that is being computed again
    language += here * kept * recomputed
    vision = 0.0
    if first and not {"vision", "mergers"} <= frozen:
        every, again = patch_bytes(config, recompute, layout.vision_tensor, "vision" in frozen)
        vision = patches * (every * in_flight[0] + again)
    logits = 0.0
    if last and not score:
        logits = WEIGHT * config.vocab_size / layout.tensor
        logits *= tokens / layout.context + (0 if "language" in frozen else config.hidden_size)
    matrices = layers * count.layer / layout.tensor
    gathered = matrices if fp8_param_gather else 0.0
    # of a layer's up and gate projections, before it is added to what other micro-batches gave
    added = 0.0 if not trained_experts else WEIGHT * 2 / 3 * count.experts / split
    state, shard = 4 + 2 * moment_bytes, trained / ranks + trained_experts / expert_shard
    ends = max(first * count.embedding, last * head) / layout.tensor
    largest = min(max(PIECE, ends, 2 / 3 * count.experts / split), shard)
    # moments in BF16 are in fp32 while they are updated, before weights are rounded
    beside = max(8 if moment_bytes == 2 else 0, WEIGHT if fp8_param_gather else 0)
    return Memory(
        weights=WEIGHT * (own + own_experts) - gathered,
        gradients=GRADIENT * (trained + trained_experts / split) + added,
        fp8=(2 * matrices if fp8 else 0) - gathered,
        optimizer=state * shard,
        language=language,
        head=logits,
        vision=vision,
        rounding=WEIGHT * matrices / ranks if fp8_param_gather else 0,
        pieces=state * min(largest + 2 * PIECE, shard) + beside * largest,
    )


def token_bytes(config: Qwen3VLConfig, recompute: Recompute, fp8: bool) -> tuple[int, int]:
    """Bytes that a decoder layer keeps of a token: of one computed once, and of one whose layer is
    computed again. Inputs of products are kept in the type that these compute in."""
    hidden = config.hidden_size
    queries = config.num_heads * config.head_dim
    keys = config.num_kv_heads * config.head_dim
    copies = config.top_k if config.num_experts else 1
    width = config.moe_intermediate_size if config.num_experts else config.intermediate_size
    product = 1 if fp8 else 2
    # experts' weights have their gradients in BF16
    mlp_product = 2 if config.num_experts else product
    # inputs of the norms of the layer, of queries and keys; what is rotated, and values
    attention = 2 * (hidden + queries + 2 * keys + queries + keys)
    projected, result = product * hidden, product * queries
    # each copy of a token: what goes in, up and gate, their product; with experts what comes out
    mlp = 2 * hidden + copies * (mlp_product * hidden + 2 * 2 * width)
    activated = copies * mlp_product * width
    if config.num_experts:
        mlp += copies * 2 * hidden
    if recompute.granularity == "selective":
        modules = set(recompute.modules)
        if {"mlp", "moe"} & modules:
            mlp, activated = 2 * hidden, 0
        if "core_attn" in modules:
            result = 0
        if "layernorm" in modules:
            projected = 0
            mlp -= product * hidden if mlp > 2 * hidden and copies == 1 else 0
        if "moe_act" in modules:
            activated = 0
    return attention + projected + result + mlp + activated, 2 * hidden


def patch_bytes(
    config: Qwen3VLConfig, recompute: Recompute, tensor: int, frozen: bool
) -> tuple[float, float]:
    """Bytes that the tower keeps of a patch, and those of the block that is being computed again;
    frozen: the blocks, without the mergers."""
    vision = config.vision
    width = vision.hidden_size
    # inputs and outputs of both norms; queries, keys and values, two of them rotated too; the
    # result; what goes into the activation and what comes out
    block = 2 * (4 * width + (6 * width + 2 * vision.intermediate_size) / tensor)
    # of the joined patches: the norm's input and output, and the activation's
    mergers = 2 * (2 + 2 / tensor) * width * (1 + config.num_deepstack)
    if frozen:
        return mergers, 0
    if recompute.vision:
        return mergers + vision.depth * 2 * width, block
    return mergers + vision.depth * block, 0


def num_stage_layers(config: Qwen3VLConfig, layout: Layout, stage: int) -> int:
    """Decoder layers of a stage."""
    chunks = range(layout.virtual_pipeline)
    return sum(len(stage_layers(config, layout, stage, chunk)) for chunk in chunks)


def _of_chunk(warm_up: int, layout: Layout, chunk: int, micro_batches: int | None) -> int:
    """Micro-batches of a chunk among the first `warm_up` forward passes of its stage, which go
    through one chunk after the other, as many at a time as there are stages."""
    if layout.virtual_pipeline == 1:
        count = warm_up
    else:
        rounds, rest = divmod(warm_up, layout.pipeline * layout.virtual_pipeline)
        rest -= chunk * layout.pipeline
        count = rounds * layout.pipeline + max(0, min(layout.pipeline, rest))
    return count if micro_batches is None else min(count, micro_batches)
