"""Steps of a stage as it is configured, by where their time goes."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch.distributed as dist

from model_providers import backend as backends
from prism_megatron.bench import workload
from prism_megatron.config import load as configuration
from prism_megatron.config.schema import Stage

STAGES = {"sft": "sft", "warmup": "warmup", "align": "alignment", "rlvr": "rlvr"}
"""Stage to its pipeline."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A stage, its configuration, and how many of its steps."""
    add = parser.add_argument
    add("stage", choices=STAGES)
    add("--config", action="append", required=True, type=Path, metavar="FILE")
    add("--steps", type=int, default=5, help="that count; 5")
    add("--warmup", type=int, default=2, help="before them; 2")
    add("overrides", nargs="*", metavar="section.field=value")


def run(options: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """Run the stage into a folder beside the result, which must not be there yet."""
    total = options.warmup + options.steps
    folder = options.out / f"run-{options.stage}"
    overrides = [*options.overrides, f"run.dir={folder}", f"train.steps={total}"]
    config = configuration.load(options.stage, options.config, overrides)
    assert isinstance(config, Stage)
    backends.create(config.backend).init_process_group()
    there = [False] * dist.get_world_size()
    # before any rank makes it
    dist.all_gather_object(there, folder.exists())
    if any(there):
        raise ValueError(f"{folder} is there already; choose another --out, or remove it")
    pipeline: Callable[[Stage], None] = import_module(
        f"prism_megatron.pipelines.{STAGES[options.stage]}"
    ).run
    pipeline(config)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    dist.barrier()
    yield f"step-{options.stage}", summary(options.stage, config, lines[options.warmup :])


def summary(stage: str, config: Stage, lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the steps; `split` adds up to a step with the saving before it."""
    backend, world = backends.create(config.backend), dist.get_world_size()
    device = backend.device_name()
    names = sorted({name for line in lines for name in line if name.startswith("time/")})
    split = {
        name.removeprefix("time/"): statistics.mean(line.get(name, 0.0) for line in lines)
        for name in names
    }
    seconds = [line["time"] for line in lines]
    tokens = [line["train_tokens"] / line["time"] / world for line in lines]
    of_step = sum(line["train_tflop"] for line in lines) / sum(seconds) / world
    train = sum(line["time/train"] for line in lines)
    of_train = sum(line["train_tflop"] for line in lines) / train / world
    return {
        "what": f"steps of {stage}",
        "kind": "step",
        "stage": stage,
        "gpus": world,
        "step_s": statistics.median(seconds),
        "steps_s": seconds,
        "split_s": split,
        "tokens_per_s_per_gpu": statistics.median(tokens),
        "tflops_per_gpu": of_step,
        "mfu": workload.mfu(of_step, device),
        "train_tflops_per_gpu": of_train,
        "train_mfu": workload.mfu(of_train, device),
        "config": config.model_dump(mode="json"),
        **workload.environment(backend),
    }
