"""How long a training step takes, estimated from sizes: a bound a resource, and what adds up.

    products     matrix products, at a share of the peak, and reading weights, adding to gradients
    attention    at a share of the peak
    pointwise    norms, activations, casts: memory
    tensor, context, experts, pipeline
                 collectives that the next kernel waits for: all-gather and reduce-scatter of tensor
                 parallelism, keys and values around the context ranks (part of which attention may
                 hide), all-to-all of tokens, sending from stage to stage
    gaps         no kernel runs
    bubble       stages wait for the first and the last micro-batch
    gradients    reduce-scatter, as far as the last backward pass does not hide it
    update       Adam, all-gather of weights, optimizer state from and to the host

Times of a micro-batch are those of the slowest pipeline stage. hardware.py has the constants,
tests/unit/test_measured_time.py compares with what was measured. The host queues kernels beside all
that, and a step takes no less than it needs.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from model_providers.architecture import Qwen3VLConfig
from model_providers.config import Recompute, stage_layers
from model_providers.memory import (
    NO_RECOMPUTE,
    images_of_a_rank,
    num_stage_layers,
    parameters,
    patch_bytes,
    stages_that_differ,
    token_bytes,
)
from model_providers.parallel import Layout
from prism_megatron.flops import frame_flops, layer_flops
from prism_megatron.planner import hardware
from prism_megatron.planner.hardware import GPU


@dataclass(frozen=True)
class Work:
    """A step over all ranks."""

    tokens: float
    squares: float
    """Sum of the sequences' squared lengths."""
    images: float
    patches: int
    """Of an image."""
    micro_batches: int
    """Of each data-parallel rank."""


@dataclass(frozen=True)
class Options:
    """What else a step's time depends on."""

    recompute: Recompute = NO_RECOMPUTE
    fp8: bool = False
    fp8_param_gather: bool = False
    offload: bool = False
    moment_bytes: int = 4
    head: bool = True
    """A language head; otherwise a discriminator's."""
    forwards: int = 0
    """Forward passes besides, for log-probabilities or scores."""


@dataclass(frozen=True)
class StepTime:
    """Seconds; see the top of the file."""

    products: float
    attention: float
    pointwise: float
    tensor: float
    context: float
    experts: float
    pipeline: float
    gaps: float
    bubble: float
    gradients: float
    update: float
    bounds: Bounds

    @property
    def total(self) -> float:
        parts = (getattr(self, field.name) for field in fields(self) if field.name != "bounds")
        return max(sum(parts), self.bounds.host)


@dataclass(frozen=True)
class Bounds:
    """Seconds that the slowest GPU keeps each resource busy; a step takes the longest or more."""

    compute: float
    hbm: float
    nvlink: float
    network: float
    host: float
    """The host's, which queues the kernels."""


@dataclass
class Spent:
    """Seconds of one micro-batch, forward and backward, on one stage."""

    products: float = 0.0
    weights: float = 0.0
    """Memory's part in products."""
    attention: float = 0.0
    pointwise: float = 0.0
    tensor: float = 0.0
    context: float = 0.0
    experts: float = 0.0
    experts_network: float = 0.0
    gaps: float = 0.0
    host: float = 0.0
    """Beside all that."""

    @property
    def total(self) -> float:
        return sum(vars(self).values()) - self.host


def estimate(
    config: Qwen3VLConfig, layout: Layout, world: int, work: Work, gpu: GPU, options: Options
) -> StepTime:
    """The time of one optimizer step. ValueError if the layout does not divide the world."""
    stages = stages_that_differ(layout)
    spent = [micro_batch(config, layout, world, stage, work, gpu, options) for stage in stages]
    slowest = max(spent, key=lambda one: one.total)
    count, alone = work.micro_batches, slowest.total
    bubble = (layout.pipeline - 1) / layout.virtual_pipeline * alone
    sent, over_network = _between_stages(config, layout, world, work)
    gradients, gather, update, grads_on_network = _update(config, layout, world, gpu, options)
    # the interleaved schedule sends beside the computation
    pipeline = 0.0 if layout.virtual_pipeline > 1 else sent
    exposed = max(0.0, gradients - alone * 2 / 3)
    context_on_network = layout.tensor * layout.context > hardware.NODE
    on_network = slowest.experts_network + (slowest.context if context_on_network else 0)
    on_nvlink = slowest.tensor + slowest.experts + (0 if context_on_network else slowest.context)
    collectives = gradients + gather
    return StepTime(
        products=count * (slowest.products + slowest.weights),
        attention=count * slowest.attention,
        pointwise=count * slowest.pointwise,
        tensor=count * slowest.tensor,
        context=count * slowest.context,
        experts=count * (slowest.experts + slowest.experts_network),
        pipeline=count * pipeline,
        gaps=count * slowest.gaps,
        bubble=bubble,
        gradients=exposed,
        update=gather + update,
        bounds=Bounds(
            compute=count * (slowest.products + slowest.attention),
            hbm=count * (slowest.pointwise + slowest.weights) + update,
            nvlink=count * (on_nvlink + (0 if over_network else sent))
            + (0 if grads_on_network else collectives),
            network=count * (on_network + (sent if over_network else 0))
            + (collectives if grads_on_network else 0),
            host=count * slowest.host,
        ),
    )


def micro_batch(
    config: Qwen3VLConfig,
    layout: Layout,
    world: int,
    stage: int,
    work: Work,
    gpu: GPU,
    options: Options,
) -> Spent:
    """What one micro-batch takes on a pipeline stage."""
    spent = Spent()
    share = layout.data(world) * work.micro_batches
    # of one tensor- and context-parallel rank
    tokens = work.tokens / share / layout.context
    squares = work.squares / share / layout.context
    layers = num_stage_layers(config, layout, stage)
    again = _recomputed(config, layout, stage, options.recompute)
    passes = 3 + options.forwards
    linear, experts, attention = layer_flops(config, tokens, squares)
    bf16 = gpu.bf16 * hardware.PRODUCTS
    rate = gpu.fp8 * hardware.FP8_PRODUCTS if options.fp8 else bf16
    selective = set(options.recompute.modules)
    of_mlp = 2 * tokens * 3 * config.hidden_size * config.intermediate_size
    if config.num_experts:
        of_mlp = 0
    repeated = linear * again + of_mlp * layers * ("mlp" in selective)
    spent.products += (linear * layers * passes + repeated) / layout.tensor / rate
    repeated = experts * (again + layers * ("moe" in selective))
    # their weights' gradients are in BF16
    cheaper = hardware.FP8_EXPERTS if options.fp8 else 1
    spent.products += (
        (experts * layers * (passes - 1) + repeated) / cheaper + experts * layers
    ) / (layout.tensor * bf16 * hardware.GROUPED_PRODUCTS)
    repeated = attention * (again + layers * ("core_attn" in selective))
    spent.attention += (
        (attention * layers * passes + repeated) / layout.tensor / (gpu.bf16 * hardware.ATTENTION)
    )
    count = parameters(config)
    own_experts = count.experts / (layout.expert * layout.expert_tensor)
    matrices = count.layer / layout.tensor + own_experts
    width = 1 if options.fp8 else 2
    # forward, for the inputs' gradient, and the gradient in fp32 read and written
    traffic = matrices * (layers * (width * (passes - 1) + 8) + again * width)
    hbm = gpu.hbm * hardware.HBM
    kept = token_bytes(config, NO_RECOMPUTE, False)[0] / layout.tensor * tokens
    # what is computed again there is cheap
    cheap = layers / 4 * bool({"layernorm", "moe_act"} & selective)
    spent.pointwise += kept * (layers * passes + again + cheap) / 3 * hardware.PASSES / hbm
    if options.fp8:
        spent.pointwise += _casts(config) * tokens / layout.tensor * layers * passes / 3 / hbm
        # experts' weights, for each of their products
        traffic += own_experts * 3 * (layers * (passes - 1) + again)
    if stage == layout.pipeline - 1 and options.head:
        head = config.hidden_size * config.vocab_size / layout.tensor
        spent.products += 2 * tokens * head * passes / bf16
        traffic += head * (2 * (passes - 1) + 8)
        logits = 2 * tokens * config.vocab_size / layout.tensor
        spent.pointwise += logits * passes / 3 * hardware.PASSES / hbm
    spent.host += hardware.LAUNCH * (layers * passes + again) / 3
    if stage == 0 and work.images:
        _add_vision(spent, config, layout, world, work, gpu, options)
    spent.weights += traffic / hbm
    spent.gaps += hardware.GAP * layers
    _add_collectives(spent, config, layout, tokens, layers, again, options)
    return spent


def _recomputed(config: Qwen3VLConfig, layout: Layout, stage: int, recompute: Recompute) -> int:
    """Decoder layers of a stage that are computed again."""
    if recompute.granularity != "full":
        return 0
    chunks = (
        len(stage_layers(config, layout, stage, chunk)) for chunk in range(layout.virtual_pipeline)
    )
    return sum(min(size, recompute.layers or size) for size in chunks)


def _casts(config: Qwen3VLConfig) -> float:
    """Bytes moved a token and layer to bring inputs and output gradients of products to FP8."""
    hidden, queries = config.hidden_size, config.num_heads * config.head_dim
    keys, width = config.num_kv_heads * config.head_dim, config.intermediate_size
    elements = 2 * hidden + 2 * queries + 2 * keys
    if not config.num_experts:
        return (elements + 2 * hidden + 3 * width) * hardware.CAST_BYTES
    # read in BF16 and written, at once and in one orientation
    of_experts = config.top_k * (2 * hidden + 3 * config.moe_intermediate_size)
    return elements * hardware.CAST_BYTES + 3 * of_experts


def _add_vision(
    spent: Spent,
    config: Qwen3VLConfig,
    layout: Layout,
    world: int,
    work: Work,
    gpu: GPU,
    options: Options,
) -> None:
    """The tower, whose images data- and context-parallel ranks share out, or single ranks."""
    shown = work.images / layout.data(world) / work.micro_batches
    images, split = images_of_a_rank(layout, shown), layout.vision_tensor
    passes = 3 + options.forwards + options.recompute.vision
    linear, attention = frame_flops(config, work.patches)
    spent.products += linear * images * passes / split / (gpu.bf16 * hardware.PRODUCTS)
    rate = gpu.bf16 * hardware.ATTENTION
    spent.attention += attention * images * passes / split / rate
    kept, _ = patch_bytes(config, NO_RECOMPUTE, split, frozen=False)
    moved = kept * work.patches * images * passes / 3 * hardware.PASSES
    spent.pointwise += moved / (gpu.hbm * hardware.HBM)
    spent.gaps += hardware.GAP * config.vision.depth
    spent.host += hardware.LAUNCH * config.vision.depth * passes / 3
    # an all-reduce behind attention and behind the feed-forward part of a block
    sent = 2 * work.patches * images * config.vision.hidden_size * config.vision.depth
    ring = 2 * (split - 1) / split
    spent.tensor += 2 * (passes - 1) * sent * ring / hardware.NVLINK
    # features of the images of a row to all that show them, and their gradients back
    others = 1 - 1 / layout.towers
    rows = work.patches * shown / config.vision.spatial_merge_size**2
    features = 2 * rows * config.vision.out_hidden_size * (1 + config.num_deepstack)
    spent.tensor += (2 + options.forwards) * features * others / hardware.NVLINK


def _add_collectives(
    spent: Spent,
    config: Qwen3VLConfig,
    layout: Layout,
    tokens: float,
    layers: int,
    again: int,
    options: Options,
) -> None:
    """What the layers of a micro-batch send; tokens: of a context-parallel rank."""
    row = 2 * config.hidden_size * tokens
    forwards = layers * (1 + options.forwards) + again
    # in and out of attention and of a dense feed-forward part; backward the input is gathered
    # once more for the gradient of the weights
    blocks = 1 if config.num_experts else 2
    gathers = blocks * (2 * forwards + 3 * layers)
    spent.tensor += gathers * row * (layout.tensor - 1) / layout.tensor / hardware.NVLINK
    # keys and values go around, backward with their gradients
    ring = 4 * tokens * config.num_kv_heads * config.head_dim / layout.tensor
    rounds = (layout.context - 1) * (forwards + 2 * layers)
    network = layout.tensor * layout.context > hardware.NODE
    spent.context += rounds * ring / (hardware.NETWORK if network else hardware.NVLINK)
    if not config.num_experts:
        return
    moe = layers * ("moe" in options.recompute.modules)
    trips = 2 * (forwards + layers + moe)
    copies = config.top_k * row / layout.tensor
    split = layout.expert * layout.expert_tensor
    inside = min(split, hardware.NODE) / layout.expert_tensor
    nvlink = (inside - 1) / layout.expert + layout.expert_tensor - 1
    spent.experts += trips * copies * nvlink / (hardware.NVLINK * hardware.ALL_TO_ALL)
    outside = max(0.0, 1 - inside / layout.expert)
    spent.experts_network += trips * copies * outside / hardware.NETWORK


def _between_stages(
    config: Qwen3VLConfig, layout: Layout, world: int, work: Work
) -> tuple[float, bool]:
    """Seconds of a micro-batch's hidden states and their gradients on the way to the next stage,
    and whether they leave the host."""
    if layout.pipeline == 1:
        return 0.0, False
    tokens = work.tokens / layout.data(world) / work.micro_batches
    row = 2 * config.hidden_size * tokens / layout.context / layout.tensor
    network = world // layout.pipeline >= hardware.NODE
    rate = hardware.NETWORK if network else hardware.NVLINK
    return 2 * layout.virtual_pipeline * row / rate, network


def _update(
    config: Qwen3VLConfig, layout: Layout, world: int, gpu: GPU, options: Options
) -> tuple[float, float, float, bool]:
    """Seconds of reducing gradients, of gathering weights, of Adam with what it copies; and whether
    gradients leave the host."""
    count = parameters(config)
    worst = (0.0, 0.0, 0.0, False)
    for stage in stages_that_differ(layout):
        first, last = stage == 0, stage == layout.pipeline - 1
        layers = num_stage_layers(config, layout, stage)
        dense = layers * count.layer + first * count.embedding
        dense += last * options.head * count.head
        tower = first * (count.vision + count.mergers) / layout.vision_tensor
        dense = dense / layout.tensor + tower
        experts = layers * count.experts / (layout.expert * layout.expert_tensor)
        ranks = layout.data(world) * layout.context
        seconds, network = _ring(dense, ranks, layout.tensor)
        expert_ranks = layout.expert_data(world)
        more, also = _ring(experts, expert_ranks, layout.expert * layout.expert_tensor)
        a_byte = seconds + more
        weights = 2 * a_byte
        if options.fp8_param_gather:
            matrices = layers * count.layer / layout.tensor
            weights -= _ring(matrices, ranks, layout.tensor)[0]
        shard = dense / ranks + experts / expert_ranks
        state = 4 + 2 * options.moment_bytes
        # gradients, weights and moments read, the last two written; buffers zeroed and summed up
        moved = shard * (4 + 2 * state) + 8 * (dense + experts)
        update = moved / (gpu.hbm * hardware.HBM)
        if options.offload:
            # there and back at the same time
            update = max(update, shard * state / hardware.HOST)
        # of a replicated tower the gradients are summed over tensor-parallel ranks
        update += 4 * tower * 2 * (layout.towers - 1) / layout.towers / hardware.NVLINK
        worst = max(worst, (4 * a_byte, weights, update, network or also))
    return worst


def _ring(elements: float, ranks: int, stride: int) -> tuple[float, bool]:
    """Seconds of gathering one byte an element over `ranks` ranks that are `stride` apart, and
    whether that leaves the host, on which all such groups together have a network card a GPU."""
    moved = elements * (ranks - 1) / ranks
    together = max(1, hardware.NODE // stride)
    if ranks <= together:
        return moved / hardware.NVLINK, False
    return moved / min(hardware.NVLINK, together * hardware.NETWORK), True
