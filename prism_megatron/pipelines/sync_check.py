"""Does every weight reach the rollout engines, and do they compute what the trainer computes?

policy --sync--> engines: tensors kept, scrambled --sync--> compared, one by one
policy --export, checkpoint_tools.quantize--> engines: the same, if a sync quantises
prompts --> engines --> responses and log-probabilities --> the trainer's own, token by token
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from checkpoint_tools import hf_writer, world
from checkpoint_tools.files import write_atomically
from checkpoint_tools.headers import hf_directory
from checkpoint_tools.megatron_directory import load_model
from checkpoint_tools.quantize import quantize
from model_providers.parallel import ParallelState
from model_providers.qwen3_vl import Qwen3VLModel
from model_providers.weight_plan import Quantization, WeightPlan
from prism_megatron.config import schema
from prism_megatron.data.prompts import rollout_sequence
from prism_megatron.data.rows import PromptRow, read_prompts
from prism_megatron.data.sources import open_sources
from prism_megatron.data.stream import BatchStream
from prism_megatron.rollout import fleet
from prism_megatron.training.policy import engine_routes, response_logprobs
from prism_megatron.training.runner import ModelRunner
from prism_megatron.training.setup import (
    build_encoder,
    layout_of,
    open_quarantine,
    options_of,
    start,
)
from prism_megatron.types import Prompt, Rollout

Report = dict[str, Any]


@dataclass(frozen=True)
class Parts:
    """A policy that infers, the engines that sample from it, and prompts."""

    runner: ModelRunner
    engines: fleet.Fleet
    stream: BatchStream[PromptRow, Prompt]


def build(config: schema.SyncCheck) -> Parts:
    """All of them as configured; the engines have no weights yet."""
    backend = start(config)
    encoder = build_encoder(config.policy.path, config.data)
    stream = BatchStream(
        open_sources(config.data, read_prompts),
        encoder.encode_prompt,
        open_quarantine(config.run, config.data),
        batch_size=config.prompts,
        seed=config.run.seed,
    )
    parallel = ParallelState.create(layout_of(config.policy.parallel))
    backend.seed(config.run.seed, parallel)
    options = options_of(config.policy, 0.0, 0.0)
    model = load_model(config.policy.path, parallel, backend, "language", options)
    hf_dir = hf_directory(config.policy.path)
    quantization = config.rollout.quantization
    if quantization is not None:
        hf_dir = quantised_offline(model, hf_dir, config.run.dir, quantization)
    engines = fleet.build(
        config.rollout,
        model,
        hf_dir,
        seed=config.run.seed,
        logs=config.run.dir / "engines",
    )
    runner = ModelRunner(
        model, micro_batch_tokens=config.micro_batch_tokens, pad_id=encoder.pad_id, optimizer=None
    )
    return Parts(runner, engines, stream)


def run(config: schema.SyncCheck) -> None:
    """Write run.dir/sync_check.json; RuntimeError if a weight did not come, or the log-
    probabilities are further apart than max_distance."""
    parts = build(config)
    report = weights_come(parts.engines, loaded=config.rollout.quantization is not None)
    report |= logprobs_agree(
        parts.engines, parts.runner, parts.stream.next_batch(), config.sampling
    )
    if dist.get_rank() == 0:
        write_atomically(config.run.dir / "sync_check.json", json.dumps(report, indent=2) + "\n")
        _print(report)
    problems = report["problems"]
    if report["mean_distance"] > config.max_distance:
        problems.append(
            f"log-probabilities of engines and trainer are {report['mean_distance']:.4f} apart on "
            f"average, max_distance is {config.max_distance}"
        )
    if problems:
        raise RuntimeError("; ".join(problems))


def quantised_offline(
    model: Qwen3VLModel, config_from: Path, folder: Path, quantization: Quantization
) -> Path:
    """The directory that the offline quantiser makes of an export of the model, in `folder`."""
    exported, out = folder / "exported", folder / quantization
    plan = WeightPlan(model, receivers=[0])
    hf_writer.write(exported, plan.weights(), plan.nbytes, config_from)
    world.first(lambda: shutil.rmtree(out, ignore_errors=True))
    quantize(exported, out, quantization)
    world.first(lambda: shutil.rmtree(exported))
    return out


def weights_come(engines: fleet.Fleet, *, loaded: bool) -> Report:
    """Keep, scramble, sync, compare. `problems` has what differs; seconds of the sync.

    loaded: engines have from a checkpoint what the sync is to bring; otherwise a sync comes first.
    """
    if not loaded:
        engines.sync(0)
    problems = engines.check("snapshot") + engines.check("reset_tensors")
    if not engines.check("compare"):
        problems.append("the scrambled weights count as equal, so that the check sees nothing")
    seconds = engines.sync(1)
    return {"problems": problems + engines.check("compare"), "sync_s": seconds}


def logprobs_agree(
    engines: fleet.Fleet, runner: ModelRunner, prompts: list[Prompt], sampling: schema.Sampling
) -> Report:
    """Distance of the engines' log-probabilities from the trainer's, over all response tokens."""
    engines.submit(prompts, sampling, 0)
    rollouts = engines.collect(engines.weight_version)
    return distances(
        runner, [(p, r) for p, group in zip(prompts, rollouts, strict=True) for r in group]
    )


def distances(runner: ModelRunner, samples: list[tuple[Prompt, Rollout]]) -> Report:
    """Mean, 99th percentile and largest distance; mean over prompts with images apart. The trainer
    takes the engine's experts where it told them."""
    sequences = [
        replace(
            rollout_sequence(prompt, rollout.ids, {}),
            routes=None if rollout.routes is None else engine_routes(runner, prompt, rollout),
        )
        for prompt, rollout in samples
    ]
    found = runner.infer(sequences, response_logprobs)
    ours = torch.cat([f[s.response_mask].cpu() for f, s in zip(found, sequences, strict=True)])
    theirs = torch.cat([torch.tensor(rollout.logprobs) for _, rollout in samples])
    shown = torch.cat([torch.full((len(r.ids),), bool(p.images)) for p, r in samples])
    apart = (ours - theirs).abs()
    with_images = apart[shown]
    return {
        "tokens": len(apart),
        "mean_distance": float(apart.mean()),
        "p99_distance": float(apart.quantile(0.99)),
        "largest_distance": float(apart.max()),
        "mean_distance_with_images": float(with_images.mean()) if len(with_images) else None,
        "mean_logprob": float(theirs.mean()),
        "weight_versions": sorted({rollout.weight_version for _, rollout in samples}),
    }


def _print(report: Report) -> None:
    table = Table("check", "found")
    table.add_row("weights that differ", "; ".join(report["problems"]) or "none")
    for phase, seconds in report["sync_s"].items():
        table.add_row(f"sync, {phase}", f"{seconds:.3f} s")
    for name in ("tokens", "mean_distance", "mean_distance_with_images", "largest_distance"):
        value = report[name]
        table.add_row(name, f"{value:.4f}" if isinstance(value, float) else str(value))
    Console().print(table)
