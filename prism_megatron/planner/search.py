"""Every layout that a model has on so many GPUs: those that fit, the fastest first.

sizes that check_layout accepts --> least recomputation and offload that fits --> step time
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

from model_providers import memory
from model_providers.config import Qwen3VLConfig, Recompute
from model_providers.memory import Memory, training_bytes
from model_providers.parallel import Layout
from model_providers.presets import PRESETS
from prism_megatron.flops import training_flops
from prism_megatron.planner.hardware import GPU, NODE
from prism_megatron.planner.step_time import Options, StepTime, Work, estimate

MOST_ROW_TOKENS = 65536
"""Longest micro-batch that is looked at, unless a single sequence is longer."""
ROWS = (1, 2, 4, 8)
"""Sequences in a micro-batch."""
LEAST_SEQUENCES = 8
"""Sequences of full length that an engine's KV cache must hold."""
ENGINE_SHARE = 0.4
"""Of a GPU's memory for an engine's weights, above which they are spread over more GPUs."""
FILL = 0.95
"""Share of the memory that may be planned."""
DOUBT = 0.01
"""Share of a step's time that each doubling of the ranks that split a sequence or a model costs in
the ranking: of layouts about as fast, which no estimate can tell apart, the plainest is first."""
MOST_GPUS = 4096


@dataclass(frozen=True)
class Request:
    """What is to be trained, and on what."""

    model: str
    config: Qwen3VLConfig
    gpus: int
    gpu: GPU
    memory: float
    """Bytes of each GPU that may be used."""
    sequence: int
    """Tokens of a sequence, the longest and all alike."""
    sequences: int
    """Of a step."""
    patches: int
    """Of the image of a sequence."""
    stage: str = "sft"
    """sft, rlvr (with an engine that sleeps), align (with a discriminator besides)."""
    fp8: str | None = None
    moments: str = "float32"


@dataclass(frozen=True)
class Engine:
    """A rollout engine on the trainers' GPUs, which sleeps while they train."""

    tensor: int
    weights: float
    """Bytes on each of its GPUs."""
    cache: float
    """Bytes that the trainer's weights and optimizer leave to its KV cache."""
    tokens: float
    """That this holds, on all its GPUs together."""


@dataclass(frozen=True)
class Candidate:
    """A layout that fits, with what it takes."""

    layout: Layout
    recompute: Recompute
    offload: bool
    moments: str
    row_tokens: int
    """Of a micro-batch."""
    micro_batches: int
    memory: Memory
    others: float
    """Bytes besides: a discriminator, a sleeping engine, contexts, buffers."""
    peak: float
    engine: Engine | None
    time: StepTime

    @property
    def seconds(self) -> float:
        return self.time.total

    @property
    def rank(self) -> float:
        """What candidates are ordered by; see DOUBT."""
        layout = self.layout
        split = layout.tensor * layout.context * layout.pipeline * (2 if self.offload else 1)
        return self.seconds * (1 + DOUBT * math.log2(split * layout.virtual_pipeline))


@dataclass(frozen=True)
class Found:
    """Candidates, the fastest first, and how near the nearest came if there are none."""

    candidates: list[Candidate]
    least: float
    """Fewest bytes that any layout takes of a GPU."""


def search(request: Request) -> Found:
    """All that fits, the fastest of each tensor, pipeline and expert size."""
    best: dict[tuple[int, ...], Candidate] = {}
    least = float("inf")
    for layout in layouts(request.config, request.gpus, request.sequence):
        for row, count in _micro_batches(request, layout):
            found, needed = _fit(request, layout, row, count)
            least = min(least, needed)
            for candidate in found:
                key = (layout.tensor, layout.pipeline, layout.expert)
                if key not in best or candidate.rank < best[key].rank:
                    best[key] = candidate
    return Found(sorted(best.values(), key=lambda one: one.rank), least)


def fewest_gpus(request: Request) -> tuple[int, Candidate] | None:
    """The fewest GPUs, doubling from the request's, on which a layout fits, and the fastest."""
    gpus = request.gpus
    while (gpus := 2 * gpus) <= MOST_GPUS:
        if found := search(replace(request, gpus=gpus)).candidates:
            return gpus, found[0]
    return None


def layouts(config: Qwen3VLConfig, gpus: int, sequence: int) -> Iterator[Layout]:
    """What check_layout accepts, tensor parallelism within a host, powers of two."""
    for stages in _pipelines(config, gpus):
        for tensor in _powers(min(NODE, gpus // stages.pipeline)):
            for context in _powers(gpus // stages.pipeline // tensor):
                if gpus % (stages.pipeline * tensor * context) or (
                    context > 1 and sequence // context < 2048
                ):
                    continue
                for expert in _powers(min(config.num_experts or 1, gpus // stages.pipeline)):
                    layout = replace(
                        stages,
                        tensor=tensor,
                        context=context,
                        expert=expert,
                        sequence_parallel=tensor > 1,
                    )
                    if gpus % (stages.pipeline * expert) == 0 and _is_legal(config, layout):
                        yield layout


@cache
def _pipelines(config: Qwen3VLConfig, gpus: int) -> tuple[Layout, ...]:
    """Ways to spread the decoder's layers over stages."""
    found = [Layout()]
    for pipeline in _powers(min(gpus, config.num_layers))[1:]:
        if gpus % pipeline:
            continue
        for chunks in (1, 2, 3, 4):
            for ends in (False, True):
                found.append(
                    Layout(
                        pipeline=pipeline,
                        virtual_pipeline=chunks,
                        embedding_as_layer=ends,
                        loss_as_layer=ends,
                    )
                )
        # ends with a few layers less, where the others can't share all of them evenly
        for less in range(1, 5):
            inner = -(-config.num_layers // pipeline)
            outer = (config.num_layers - inner * (pipeline - 2)) // 2
            ends_less = Layout(
                pipeline=pipeline,
                first_stage_layers=outer - (less - 1),
                last_stage_layers=outer - (less - 1),
            )
            if pipeline > 2 and outer >= less:
                found.append(ends_less)
    return tuple(layout for layout in found if _is_legal(config, layout))


def _is_legal(config: Qwen3VLConfig, layout: Layout) -> bool:
    try:
        config.check_layout(layout)
    except ValueError:
        return False
    return True


def _powers(most: int) -> list[int]:
    return [2**i for i in range(most.bit_length()) if 2**i <= most]


def _micro_batches(request: Request, layout: Layout) -> Iterator[tuple[int, int]]:
    """Tokens of a micro-batch, and how many a data-parallel rank has in a step."""
    data = layout.data(request.gpus)
    if data > request.sequences:
        return
    own = -(-request.sequences // data)
    for rows in ROWS:
        tokens = rows * request.sequence
        if rows > 1 and (tokens > MOST_ROW_TOKENS or rows > own):
            return
        count = -(-own // rows)
        if layout.virtual_pipeline > 1:
            # the runner makes them a multiple of the stages
            count = -(-count // layout.pipeline) * layout.pipeline
            if count > own:
                return
        yield tokens, count


def _fit(request: Request, layout: Layout, row: int, count: int) -> tuple[list[Candidate], float]:
    """With and without offload: the least recomputation with which it fits; and the fewest bytes
    that it takes, whether or not they fit."""
    least = float("inf")
    found: list[Candidate] = []
    ladder = _ladder(request.config, layout)
    for offload in (False, True):
        others = _others(request, offload)

        def need(
            recompute: Recompute, offload: bool = offload, others: _Others = others
        ) -> tuple[Memory, float]:
            memory = training_bytes(
                request.config,
                layout,
                request.gpus,
                tokens=row,
                patches=request.patches * row / request.sequence / layout.context,
                micro_batches=count,
                recompute=recompute,
                moment_bytes=2 if request.moments == "bfloat16" else 4,
                fp8=request.fp8 is not None,
                offload=offload,
            )
            worst = max(others.worst, memory.activations, memory.optimizer if offload else 0)
            return memory, others.held + memory.held(offload) + worst

        smallest, peak = need(ladder[-1])
        engine, sampling = _engine(request, smallest, offload, others)
        least = min(least, max(peak, sampling))
        if max(peak, sampling) > request.memory:
            continue
        # each step of the ladder takes less memory than the one before
        place = bisect_left(
            ladder, True, hi=len(ladder) - 1, key=lambda step: need(step)[1] <= request.memory
        )
        recompute = ladder[place]
        memory, peak = need(recompute)
        time = _time(request, layout, count, recompute, offload)
        found.append(
            Candidate(
                layout,
                recompute,
                offload,
                request.moments,
                row,
                count,
                memory,
                others.held,
                peak,
                engine,
                time,
            )
        )
        if place == 0:
            # there is nothing that offload could save
            break
    return found, least


def _ladder(config: Qwen3VLConfig, layout: Layout) -> list[Recompute]:
    """Recomputation from none to all, ever less memory for ever more time."""
    modules = ("layernorm", "moe_act") if config.num_experts else ("layernorm",)
    # of the layers of a virtual stage
    layers = -(-config.num_layers // (layout.pipeline * layout.virtual_pipeline))
    parts = sorted({-(-layers * quarter // 4) for quarter in (1, 2, 3)} - {0, layers})
    return [
        Recompute(),
        Recompute(vision=True),
        Recompute("selective", modules, vision=True),
        *(Recompute("full", layers=part, vision=True) for part in parts),
        Recompute("full", vision=True),
    ]


@dataclass(frozen=True)
class _Others:
    """Bytes that are not the policy's: all the time, and at the others' worst moment."""

    held: float
    worst: float
    resident: float
    """While responses are sampled."""


DISCRIMINATOR = replace(PRESETS["qwen3-vl-2b"], num_experts=4, top_k=2, moe_intermediate_size=6144)
"""As the recipe upcycles it."""


@cache
def _others(request: Request, offload: bool) -> _Others:
    fixed = memory.CONTEXT + memory.BUFFERS
    if request.stage == "sft":
        return _Others(fixed, 0, fixed)
    asleep = memory.ENGINE_ASLEEP
    if request.stage == "rlvr":
        return _Others(fixed + asleep, 0, fixed)
    judge = training_bytes(
        DISCRIMINATOR,
        judge_layout(request.gpus),
        request.gpus,
        tokens=max(request.sequence, 8192),
        patches=request.patches,
        recompute=Recompute("full", vision=True),
        score=True,
        offload=offload,
    )
    worst = max(judge.activations, judge.optimizer if offload else 0)
    held = judge.held(offload)
    return _Others(fixed + asleep + held, worst, fixed + held - judge.gradients)


def judge_layout(gpus: int) -> Layout:
    """The discriminator's: experts on as many GPUs as there are of either."""
    return Layout(expert=min(DISCRIMINATOR.num_experts, gpus & -gpus))


def _engine(
    request: Request, need: Memory, offload: bool, others: _Others
) -> tuple[Engine | None, float]:
    """The engine that the trainer leaves room for while responses are sampled, when gradients and
    activations are given back; and the bytes that both take with the smallest KV cache."""
    if request.stage == "sft":
        return None, 0.0
    config = request.config
    weights = memory.WEIGHT * memory.parameters(config).total
    fixed = others.resident + memory.ENGINE_ASLEEP + need.held(offload) - need.gradients
    sizes = _powers(min(NODE, request.gpus))
    share = ENGINE_SHARE * request.memory
    tensor = next((size for size in sizes if weights / size <= share), sizes[-1])
    # key and value heads that are fewer than GPUs are copied
    heads = max(1, config.num_kv_heads // tensor)
    token = 2 * 2 * config.num_layers * heads * config.head_dim
    room = request.memory - fixed - weights / tensor
    least = fixed + weights / tensor + LEAST_SEQUENCES * request.sequence * token
    return Engine(tensor, weights / tensor, room, room / token), least


def _time(
    request: Request, layout: Layout, count: int, recompute: Recompute, offload: bool
) -> StepTime:
    """Of one update on all sequences of the step, or on as many as the busiest rank has, times the
    ranks."""
    data = layout.data(request.gpus)
    rows = -(-request.sequences // data) * data
    work = Work(
        rows * request.sequence,
        rows * request.sequence**2,
        rows if request.patches else 0,
        request.patches,
        count,
    )
    options = Options(
        recompute=recompute,
        fp8=request.fp8 is not None,
        offload=offload,
        moment_bytes=2 if request.moments == "bfloat16" else 4,
    )
    return estimate(request.config, layout, request.gpus, work, request.gpu, options)


def model_flops(request: Request) -> float:
    """Of an update over the whole step, as MFU counts them."""
    side = round(request.patches**0.5)
    grids = [(1, side, side)] if request.patches else []
    one = training_flops(request.config, [request.sequence], grids).total
    return one * request.sequences
