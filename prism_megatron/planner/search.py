"""Every layout that a model has on so many GPUs: those that fit, the fastest first.

sizes that check_layout accepts --> least recomputation and offload that fits --> step time
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Literal

from model_providers import checks, memory
from model_providers.architecture import Qwen3VLConfig
from model_providers.config import Recompute
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
DOUBT = 0.02
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
    fp8_param_gather: bool = False
    vision: Literal["sharded", "replicated"] = "sharded"
    """See Layout."""


@dataclass(frozen=True)
class Engine:
    """A rollout engine on the trainers' GPUs, which sleeps while they train."""

    tensor: int
    weights: float
    """Bytes on each of its GPUs."""
    cache: float
    """Bytes that the trainer's weights and optimizer leave to its KV cache."""
    token: float
    """Bytes that a token takes of it."""

    @property
    def tokens(self) -> float:
        """That the cache holds."""
        return self.cache / self.token


@dataclass(frozen=True)
class Candidate:
    """A layout and how it saves memory, with what that takes."""

    request: Request
    layout: Layout
    recompute: Recompute
    offload: bool
    row_tokens: int
    """Of a micro-batch."""

    @cached_property
    def micro_batches(self) -> int:
        """Of each data-parallel rank in a step."""
        rows = self.row_tokens // self.request.sequence
        own = -(-self.request.sequences // self.layout.data(self.request.gpus))
        count = -(-own // rows)
        if self.layout.virtual_pipeline > 1:
            # the runner makes them a multiple of the stages
            count = -(-count // self.layout.pipeline) * self.layout.pipeline
        return count

    @cached_property
    def memory(self) -> Memory:
        asked = self.request
        return training_bytes(
            asked.config,
            self.layout,
            asked.gpus,
            tokens=self.row_tokens,
            patches=asked.patches
            * memory.images_of_a_rank(self.layout, self.row_tokens / asked.sequence),
            micro_batches=self.micro_batches,
            recompute=self.recompute,
            fp8=asked.fp8 is not None,
            fp8_param_gather=asked.fp8_param_gather,
            offload=self.offload,
        )

    @cached_property
    def others(self) -> _Others:
        asked = self.request
        return _others(asked.stage, asked.gpus, asked.sequence, asked.patches, self.offload)

    @cached_property
    def peak(self) -> float:
        """Bytes at the worst moment of training."""
        worst = max(self.others.worst, self.memory.passing(self.offload))
        return self.others.held + self.memory.held(self.offload) + worst

    @cached_property
    def engine(self) -> Engine | None:
        """The engine that the trainer leaves room for while responses are sampled, when gradients
        and activations are given back."""
        asked, config = self.request, self.request.config
        if asked.stage == "sft":
            return None
        weights = memory.WEIGHT * memory.parameters(config).total
        fixed = self.others.resident + memory.ENGINE_ASLEEP
        fixed += self.memory.held(self.offload) - self.memory.gradients
        sizes = _powers(min(NODE, asked.gpus))
        share = ENGINE_SHARE * asked.memory
        tensor = next((size for size in sizes if weights / size <= share), sizes[-1])
        # key and value heads that are fewer than GPUs are copied
        heads = max(1, config.num_kv_heads // tensor)
        token = 2 * 2 * config.num_layers * heads * config.head_dim
        room = asked.memory - fixed - weights / tensor
        return Engine(tensor, weights / tensor, room, token)

    @property
    def needed(self) -> float:
        """Bytes at the worst moment of a step, sampling and weight sync included."""
        if self.engine is None:
            return self.peak
        least = LEAST_SEQUENCES * self.request.sequence * self.engine.token
        # a server takes its KV cache's memory after it has its weights
        least = max(least, memory.sync_bytes(self.request.config, self.layout))
        return max(self.peak, self.request.memory - self.engine.cache + least)

    @property
    def fits(self) -> bool:
        return self.needed <= self.request.memory

    @cached_property
    def time(self) -> StepTime:
        """Of one update on all sequences of the step, or on as many as the busiest rank has, times
        the ranks."""
        asked = self.request
        data = self.layout.data(asked.gpus)
        rows = -(-asked.sequences // data) * data
        work = Work(
            rows * asked.sequence,
            rows * asked.sequence**2,
            rows if asked.patches else 0,
            asked.patches,
            self.micro_batches,
        )
        options = Options(
            recompute=self.recompute,
            fp8=asked.fp8 is not None,
            fp8_param_gather=asked.fp8_param_gather,
            offload=self.offload,
        )
        return estimate(asked.config, self.layout, asked.gpus, work, asked.gpu, options)

    @property
    def rank(self) -> float:
        """What candidates are ordered by; see DOUBT."""
        layout = self.layout
        split = layout.tensor * layout.context * layout.pipeline * (2 if self.offload else 1)
        return self.time.total * (1 + DOUBT * math.log2(split * layout.virtual_pipeline))


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
    for layout in layouts(request.config, request.gpus, request.sequence, request.vision):
        for row in _rows(request, layout):
            found, needed = _fit(request, layout, row)
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


def layouts(
    config: Qwen3VLConfig,
    gpus: int,
    sequence: int,
    vision: Literal["sharded", "replicated"] = "sharded",
) -> Iterator[Layout]:
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
                        vision=vision if tensor > 1 else "sharded",
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
        checks.check_layout(config, layout)
    except ValueError:
        return False
    return True


def _powers(most: int) -> list[int]:
    return [2**i for i in range(most.bit_length()) if 2**i <= most]


def _rows(request: Request, layout: Layout) -> Iterator[int]:
    """Tokens of micro-batches of which every data-parallel rank and every stage has some."""
    own = request.sequences // layout.data(request.gpus)
    for rows in ROWS:
        tokens = rows * request.sequence
        too_few = own < rows * (layout.pipeline if layout.virtual_pipeline > 1 else 1)
        if too_few or (rows > 1 and tokens > MOST_ROW_TOKENS):
            return
        yield tokens


def _fit(request: Request, layout: Layout, row: int) -> tuple[list[Candidate], float]:
    """With and without offload, the least recomputation that fits; and the fewest bytes that the
    layout takes, whether or not they fit."""
    least = float("inf")
    found: list[Candidate] = []
    ladder = _ladder(request.config, layout)
    for offload in (False, True):
        steps = [Candidate(request, layout, step, offload, row) for step in ladder]
        least = min(least, steps[-1].needed)
        if not steps[-1].fits:
            continue
        # each step of the ladder takes less memory than the one before
        place = bisect_left(steps, True, hi=len(steps) - 1, key=lambda step: step.fits)
        found.append(steps[place])
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
def _others(stage: str, gpus: int, sequence: int, patches: int, offload: bool) -> _Others:
    fixed = memory.CONTEXT + memory.BUFFERS
    if stage == "sft":
        return _Others(fixed, 0, fixed)
    asleep = memory.ENGINE_ASLEEP
    if stage == "rlvr":
        return _Others(fixed + asleep, 0, fixed)
    judge = training_bytes(
        DISCRIMINATOR,
        judge_layout(gpus),
        gpus,
        tokens=sequence,
        patches=patches,
        recompute=Recompute("full", vision=True),
        score=True,
        offload=offload,
    )
    worst = judge.passing(offload)
    held = judge.held(offload)
    return _Others(fixed + asleep + held, worst, fixed + held - judge.gradients)


def judge_layout(gpus: int) -> Layout:
    """The discriminator's: experts on as many GPUs as there are of either."""
    return Layout(expert=min(DISCRIMINATOR.num_experts, gpus & -gpus))


def model_flops(request: Request) -> float:
    """Of an update over the whole step, as MFU counts them."""
    side = round(request.patches**0.5)
    grids = [(1, side, side)] if request.patches else []
    one = training_flops(request.config, [request.sequence], grids).total
    return one * request.sequences
