"""What a configuration asks of so many GPUs: its batches and its memory, before anything runs."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from checkpoint_tools.headers import hf_directory
from model_providers import memory
from model_providers.architecture import Qwen3VLConfig
from model_providers.backend import ABILITIES
from model_providers.config import Recompute
from model_providers.memory import Memory
from model_providers.presets import PRESETS
from prism_megatron.config.schema import (
    RLVR,
    SFT,
    Align,
    Discriminator,
    Model,
    Optimizer,
    PolicyUpdate,
    Section,
    Stage,
    Warmup,
)
from prism_megatron.environment import check_host_memory
from prism_megatron.objectives.sections import STREAMS
from prism_megatron.training.setup import check_models, layout_of, models_of

GB = 1e9


@dataclass(frozen=True)
class Need:
    """Bytes that one model takes of each GPU."""

    memory: Memory
    offload: bool
    """The optimizer's part is in host memory."""
    reference: float
    """Of the frozen start weights, where there is a KL term."""

    @property
    def held(self) -> float:
        return self.memory.held(self.offload) + self.reference


def total(models: Collection[Need]) -> float:
    """Bytes at the worst moment: one model at a time computes, or is updated."""
    worst = max(need.memory.passing(need.offload) for need in models)
    return memory.CONTEXT + memory.BUFFERS + sum(need.held for need in models) + worst


def lines(config: Section, gpus: int) -> Iterator[str]:
    """The plan of a training stage, a line a fact; nothing for other stages."""
    if not isinstance(config, Stage):
        return
    yield f"{'GPUs':<14} {gpus}"
    found, unknown = needs(config, gpus)
    for name, need in found.items():
        layout = layout_of(getattr(config, name).parallel)
        optimizer = "optimizer in host memory" if need.offload else "optimizer"
        yield (
            f"{name:<14} tensor {layout.tensor}, context {layout.context}, pipeline "
            f"{layout.pipeline}, expert {layout.expert}, data {layout.data(gpus)}: "
            f"{_weights(need) / GB:.1f} GB of weights and gradients, "
            f"{need.memory.optimizer / GB:.1f} GB of {optimizer}, about "
            f"{need.memory.activations / GB:.0f} GB of activations, of which "
            f"{need.memory.vision / GB:.0f} of images"
        )
    for name, path in unknown.items():
        yield (
            f"{name:<14} {path} is not there yet; to plan with its size, name a release: "
            f"{name}.path=Qwen3-VL-4B-Instruct"
        )
    yield f"{'step':<14} {_step(config)}"
    if not unknown:
        engines = ", rollout engines besides" if isinstance(config, Align | RLVR) else ""
        yield f"{'memory':<14} about {total(found.values()) / GB:.0f} GB on each GPU{engines}"
        if isinstance(config, Align | RLVR) and config.rollout.sleep:
            yield _sync(config, found)


def _sync(config: Align | RLVR, found: dict[str, Need]) -> str:
    """What is on a GPU that a server shares when it gets weights, and has no KV cache yet."""
    architecture = _architecture(config.policy.path)
    assert architecture is not None, "it is among the models that are known"
    count = memory.parameters(architecture)
    weights: float = memory.WEIGHT * count.total
    if config.rollout.quantization is not None:
        weights -= count.layers * (count.layer + count.experts)
    weights /= config.rollout.tensor
    # gradients are given back
    trainers = sum(need.held - need.memory.gradients for need in found.values())
    moved = memory.sync_bytes(architecture, layout_of(config.policy.parallel))
    whole = 2 * memory.CONTEXT + trainers + weights + moved
    return (
        f"{'sync':<14} about {whole / GB:.0f} GB on each GPU: {weights / GB:.1f} GB of a server's "
        f"weights, {trainers / GB:.1f} GB of trainers, {moved / GB:.1f} GB on its way; what is "
        "left then can be the server's KV cache"
    )


def needs(config: Stage, gpus: int) -> tuple[dict[str, Need], dict[str, Path]]:
    """What each model of a stage takes, and the paths of those that are not there yet.

    ValueError if a model can't be laid out and trained so.
    """
    known, unknown = {}, {}
    for name, model in models_of(config).items():
        if (architecture := _architecture(model.path)) is None:
            unknown[name] = model.path
        else:
            known[name] = architecture
    check_models(config, known, ABILITIES[config.backend])
    found = {name: _need(config, name, getattr(config, name), known[name], gpus) for name in known}
    return found, unknown


def check_host(config: Stage, gpus: int) -> None:
    """ValueError if this host has no room for the optimizers that are to lie in its memory."""
    found = needs(config, gpus)[0].values()
    check_host_memory(sum(need.memory.optimizer for need in found if need.offload))


def _architecture(path: Path) -> Qwen3VLConfig | None:
    """From a model that is there, or by the name of a release; None for one that is to be made."""
    if path.exists():
        return Qwen3VLConfig.from_hf(hf_directory(path))
    found = [name for name in PRESETS if path.name.lower().startswith(f"{name}-")]
    return PRESETS[max(found, key=len)] if found else None


def _weights(need: Need) -> float:
    found = need.memory
    return found.weights + found.gradients + found.fp8 + need.reference


def _need(config: Stage, name: str, model: Model, architecture: Qwen3VLConfig, gpus: int) -> Need:
    layout = layout_of(model.parallel)
    optimizer = getattr(config, f"{name}_optimizer", None) or getattr(config, "optimizer", None)
    assert isinstance(optimizer, Optimizer)
    found = memory.training_bytes(
        architecture,
        layout,
        gpus,
        tokens=config.train.micro_batch_tokens,
        patches=_patches(config, architecture) / (layout.context * layout.towers),
        recompute=Recompute(**model.recompute.model_dump()),
        offload_layers=model.offload_layers,
        frozen=frozenset(part for part, value in model.freeze if value),
        moment_bytes=2 if optimizer.moments == "bfloat16" else 4,
        fp8=model.fp8 is not None,
        fp8_param_gather=model.fp8_param_gather,
        score=isinstance(model, Discriminator),
        offload=optimizer.offload,
    )
    reference = 0.0
    if name == "policy" and isinstance(config, PolicyUpdate) and config.kl_coef > 0:
        reference = found.weights + (found.fp8 if model.fp8_param_gather else 0)
    return Need(found, optimizer.offload, reference)


def _patches(config: Stage, architecture: Qwen3VLConfig) -> float:
    """Of a micro-batch whose prompts are images alone and, as its responses, as long as can be."""
    prompt, response = config.data.max_prompt_tokens, config.data.max_response_tokens
    if isinstance(config, Align | RLVR):
        response = config.sampling.max_new_tokens
    visual = config.train.micro_batch_tokens * prompt / (prompt + response)
    return visual * architecture.vision.spatial_merge_size**2


def _step(config: Stage) -> str:
    """The global batch, and at most how many tokens it has."""
    prompt, response = config.data.max_prompt_tokens, config.data.max_response_tokens
    if isinstance(config, Align | RLVR):
        prompts, n = config.prompts_per_step, config.sampling.n
        longest = prompt + config.sampling.max_new_tokens
        return (
            f"{prompts} prompts x {n} responses = {prompts * n:,} responses, at most "
            f"{prompts * n * longest:,} tokens; {config.updates_per_step} update(s) of the policy"
        )
    if isinstance(config, Warmup):
        pairs = config.batch_size * len(STREAMS[config.model.streams])
        return (
            f"{config.batch_size} rows = {pairs} pairs, at most "
            f"{2 * pairs * (prompt + response):,} tokens"
        )
    assert isinstance(config, SFT)
    return (
        f"{config.batch_size} sequences, at most {config.batch_size * (prompt + response):,} tokens"
    )
