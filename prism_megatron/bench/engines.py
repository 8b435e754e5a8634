"""What rollout engines sample in a second, and how long weights take to reach them.

Both take a configuration of `sync-check`: a policy, engines, prompts and sampling.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist

from prism_megatron.bench import workload
from prism_megatron.config import load as configuration
from prism_megatron.config.schema import SyncCheck
from prism_megatron.pipelines import sync_check


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A configuration of sync-check, and how often."""
    add = parser.add_argument
    add("--config", action="append", required=True, type=Path, metavar="FILE")
    add("--repeat", type=int, default=3, help="batches, or syncs, that count; 3")
    add("--warmup", type=int, default=1, help="before them; 1")
    add("overrides", nargs="*", metavar="section.field=value")


def rollout(options: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """Prompts, sampling.n responses each, from asking until the last one is there."""
    config = _config(options)
    parts = sync_check.build(config)
    parts.engines.sync(0)
    seconds, tokens, prompts = [], [], []
    for _ in range(options.warmup + options.repeat):
        batch = parts.stream.next_batch()
        dist.barrier()
        started = time.perf_counter()
        parts.engines.submit(batch, config.sampling, 0)
        answers = parts.engines.collect(0)
        seconds.append(time.perf_counter() - started)
        tokens.append(sum(len(r.ids) for group in answers for r in group))
        prompts.append(sum(len(prompt.input_ids) for prompt in batch))
    kept = slice(options.warmup, None)
    gpus = _gpus(config)
    rate = sum(tokens[kept]) / sum(seconds[kept])
    yield (
        "rollout",
        {
            "what": "responses sampled by the rollout engines",
            "kind": "rollout",
            "gpus": gpus,
            "batch_s": statistics.median(seconds[kept]),
            "response_tokens": tokens[kept],
            "prompt_tokens": prompts[kept],
            "tokens_per_s": rate,
            "tokens_per_s_per_gpu": rate / gpus,
            "config": config.model_dump(mode="json"),
            **workload.environment(parts.runner.model.backend),
        },
    )


def sync(options: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """Weights from the trainer to the engines, seconds by phase."""
    config = _config(options)
    parts = sync_check.build(config)
    runs = [parts.engines.sync(number) for number in range(options.warmup + options.repeat)]
    kept = runs[options.warmup :]
    yield (
        "sync",
        {
            "what": "weights from the trainer to the rollout engines",
            "kind": "sync",
            "gpus": dist.get_world_size(),
            "step_s": statistics.median(run["total"] for run in kept),
            "split_s": {
                name: statistics.median(run.get(name, 0.0) for run in kept)
                for name in kept[0]
                if name != "total"
            },
            "config": config.model_dump(mode="json"),
            **workload.environment(parts.runner.model.backend),
        },
    )


def _config(options: argparse.Namespace) -> SyncCheck:
    overrides = [*options.overrides, f"run.dir={options.out}"]
    config = configuration.load("sync-check", options.config, overrides)
    assert isinstance(config, SyncCheck)
    return config


def _gpus(config: SyncCheck) -> int:
    """That sample."""
    if config.rollout.kind == "embedded":
        return dist.get_world_size()
    return config.rollout.engines * config.rollout.tensor
