"""A stage's world, models and data, from its configuration; everything that can be refused is
refused here, before the first collective of training."""

from __future__ import annotations

import os
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
from model_providers.backend import Backend
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
    Run,
    Train,
    Wandb,
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


def start(backend_name: str, run: Run, *models: Model, wandb: Wandb | None = None) -> Backend:
    """Check this host, and what every model asks for against its architecture and the backend, then
    join the world and see that all its hosts share run.dir."""
    backend = backends.create(backend_name)
    check_host(run.dir, backend.device)
    if wandb is not None and os.environ.get("RANK", "0") == "0":
        check_account(wandb)
    for model in models:
        layout = layout_of(model.parallel)
        backend.check(layout)
        architecture = Qwen3VLConfig.from_hf(hf_directory(model.path))
        checks.check_layout(architecture, layout)
        options = options_of(model)
        checks.check_recompute(architecture, options.recompute, backend)
        checks.check_offload(
            architecture, options.offload_layers, layout, options.recompute, backend
        )
        checks.check_dispatcher(architecture, options.dispatcher, layout, backend)
        options.precision.check(backend, architecture, layout, options.recompute)
        if isinstance(model, Discriminator) and model.streams == "response":
            _check_whole_response(architecture, model)
    backend.init_process_group(collective_timeout(run).total_seconds())
    check_shared(run.dir)
    return backend


def _check_whole_response(architecture: Qwen3VLConfig, model: Discriminator) -> None:
    if architecture.dedicated:
        raise ValueError(
            f"{model.path} is a dedicated discriminator: an expert judges perception or reasoning, "
            "but streams=response shows both at once; set streams=sections, or upcycle with "
            "architecture=shared"
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
    start weights.

    ValueError if router_replay is asked of a model without experts.
    """
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
    if config.router_replay != "disabled" and not policy.model.architecture.num_experts:
        raise ValueError(
            f"router_replay={config.router_replay}, but {config.policy.path} is dense; leave it out"
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
