"""A stage's world, models and data, from its configuration; everything that can be refused is
refused here, before the first collective of training."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from checkpoint_tools.headers import hf_directory
from checkpoint_tools.megatron_directory import load_model
from model_providers import backend as backends
from model_providers import checks, fp8_weights
from model_providers.architecture import Qwen3VLConfig
from model_providers.backend import Abilities, Backend
from model_providers.config import Precision, Recompute, TrainingOptions
from model_providers.parallel import Layout, ParallelState
from model_providers.qwen3_vl import Head
from prism_megatron.config.schema import (
    RLVR,
    Align,
    Data,
    Discriminator,
    Model,
    Optimizer,
    Parallel,
    PolicySampling,
    PolicyUpdate,
    Run,
    Section,
    Stage,
    SyncCheck,
    Train,
)
from prism_megatron.data.prompts import PromptEncoder
from prism_megatron.data.stream import Bad, Quarantine
from prism_megatron.environment import check_host, check_shared
from prism_megatron.training.metrics_log import check_account
from prism_megatron.training.runner import ModelRunner

DEFAULT_TIMEOUT = 600
"""Seconds, for collectives that no watchdog watches."""


def layout_of(parallel: Parallel) -> Layout:
    """The configuration's section as megatron groups want it."""
    sizes = parallel.model_dump(exclude={"sequence"})
    return Layout(**sizes, sequence_parallel=parallel.sequence_parallel)


def collective_timeout(run: Run) -> timedelta:
    """Of every group: the watchdog says who is missing before a collective just fails."""
    return timedelta(seconds=4 * (run.hang_timeout or DEFAULT_TIMEOUT))


def options_of(
    model: Model,
    aux_loss_coef: float = 0.0,
    z_loss_coef: float = 0.0,
    entropy: Literal["none", "metric", "loss"] = "none",
) -> TrainingOptions:
    """The same for what the modules know of their training."""
    rounded = isinstance(model, Discriminator) and model.score_precision == "reference"
    return TrainingOptions(
        aux_loss_coef,
        z_loss_coef,
        Recompute(**model.recompute.model_dump()),
        model.offload_layers,
        Precision(
            model.fp8, model.bf16_first_layers, model.bf16_last_layers, model.fp8_param_gather
        ),
        model.dispatcher,
        entropy,
        torch.bfloat16 if rounded else torch.float32,
    )


def start(config: Stage | PolicySampling | SyncCheck) -> Backend:
    """Check this host, and what every model asks for against its architecture and the backend, then
    join the world and see that all its hosts share run.dir."""
    backend = backends.create(config.backend)
    check_host(config.run.dir, backend.device)
    wandb = config.wandb if isinstance(config, Stage) else None
    if wandb is not None and os.environ.get("RANK", "0") == "0":
        check_account(wandb)
    models = models_of(config)
    check_models(
        config,
        {name: Qwen3VLConfig.from_hf(hf_directory(one.path)) for name, one in models.items()},
        backend,
    )
    for model in models.values():
        checks.check_installed(model.dispatcher)
    backend.init_process_group(collective_timeout(config.run).total_seconds())
    check_shared(config.run.dir)
    return backend


def models_of(config: Section) -> dict[str, Model]:
    """The models that a stage builds, by the names of their sections."""
    return {name: section for name, section in config if isinstance(section, Model)}


def check_models(
    config: Section, architectures: Mapping[str, Qwen3VLConfig], backend: Abilities
) -> None:
    """ValueError if one of the stage's models, by the names of their sections, can't be what it is
    asked to be. Needs no device."""
    for name, architecture in architectures.items():
        model: Model = getattr(config, name)
        try:
            checks.check_model(architecture, layout_of(model.parallel), options_of(model), backend)
        except ValueError as error:
            raise ValueError(f"{name} ({model.path}): {error}") from error
        whole = isinstance(model, Discriminator) and model.streams == "response"
        if whole and architecture.dedicated:
            raise ValueError(
                f"{model.path} is a dedicated discriminator: an expert judges perception or "
                "reasoning, but streams=response shows both at once; set streams=sections, or "
                "upcycle with architecture=shared"
            )
        replayed = name == "policy" and isinstance(config, PolicyUpdate)
        if replayed and config.router_replay != "disabled" and not architecture.num_experts:
            raise ValueError(
                f"router_replay={config.router_replay}, but {model.path} is dense; leave it out"
            )


def build_runner(
    section: Model,
    optimizer: Optimizer | None,
    backend: Backend,
    train: Train,
    run: Run,
    *,
    pad_id: int,
    head: Head = "language",
    aux_loss_coef: float = 0.0,
    z_loss_coef: float = 0.0,
    updates_per_step: int = 1,
    entropy: Literal["none", "metric", "loss"] = "none",
    mrope: bool = True,
) -> ModelRunner:
    """The section's model with its weights, ready to train, or without an optimizer to infer."""
    parallel = ParallelState.create(layout_of(section.parallel), collective_timeout(run))
    backend.seed(run.seed, parallel)
    options = options_of(section, aux_loss_coef, z_loss_coef, entropy)
    model = load_model(section.path, parallel, backend, head, options)
    model.freeze(**section.freeze.model_dump())
    if optimizer is None:
        # it is never exported, so that it needs no more than it computes with
        fp8_weights.forget(model)
    return ModelRunner(
        model,
        micro_batch_tokens=train.micro_batch_tokens,
        pad_id=pad_id,
        optimizer=optimizer,
        steps=train.steps * updates_per_step,
        mrope=mrope,
        guard=train.guard,
    )


def build_policy(
    config: Align | RLVR, backend: Backend, pad_id: int
) -> tuple[ModelRunner, ModelRunner | None]:
    """config.policy ready to train and, if the KL divergence from them counts, a frozen copy of its
    start weights."""
    policy = build_runner(
        config.policy,
        config.policy_optimizer,
        backend,
        config.train,
        config.run,
        pad_id=pad_id,
        updates_per_step=config.updates_per_step,
        entropy="loss" if config.entropy_coef else "metric",
    )
    if not config.kl_coef:
        return policy, None
    frozen = build_runner(config.policy, None, backend, config.train, config.run, pad_id=pad_id)
    return policy, frozen


def build_encoder(path: Path, data: Data) -> PromptEncoder:
    """The prompt encoder of the model at `path`, whichever format it is in."""
    return PromptEncoder.from_config(hf_directory(path), data)


def open_quarantine(run: Run, data: Data, name: str = "quarantine.jsonl") -> Quarantine:
    """The file `name` in run.dir; every rank reads the same rows, rank 0 writes them down."""
    run.dir.mkdir(parents=True, exist_ok=True)
    group = dist.new_group(backend="gloo", timeout=collective_timeout(run))

    def gather(bad: Bad) -> list[Bad]:
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, bad, group=group)
        return found

    write = dist.get_rank() == 0
    return Quarantine(run.dir / name, data.max_bad_share, write=write, gather=gather)
