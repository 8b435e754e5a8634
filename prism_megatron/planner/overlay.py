"""A planned layout as a configuration file: an overlay of a stage, or one of configs/layouts/."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import yaml

from prism_megatron.config.schema import Parallel
from prism_megatron.config.schema import Recompute as RecomputeSection
from prism_megatron.planner.hardware import NODE
from prism_megatron.planner.search import Candidate, judge_layout


def layout_file(candidate: Candidate, gpus: list[int]) -> dict[str, Any]:
    """`vars` with every key of the layout, so that an overlay leaves nothing of what it covers."""
    request = candidate.request
    return {
        "vars": {
            "model": request.model,
            "gpus": gpus,
            "gpu_memory_gb": request.gpu.gigabytes,
            "layout": _parallel(candidate),
            "recompute": _recompute(candidate),
            "optimizer": {"offload": candidate.offload},
        }
    }


def overlay(candidate: Candidate) -> dict[str, Any]:
    """The same with what the stage's sections take of it."""
    request = candidate.request
    model = "model" if request.stage == "sft" else "policy"
    found = layout_file(candidate, [request.gpus])
    found[model] = {
        "parallel": "${vars.layout}",
        "recompute": "${vars.recompute}",
        "fp8": request.fp8,
        "fp8_param_gather": request.fp8_param_gather,
    }
    optimizer = "optimizer" if request.stage == "sft" else "policy_optimizer"
    found[optimizer] = {"offload": candidate.offload}
    found["train"] = {"micro_batch_tokens": candidate.row_tokens}
    if request.stage == "align":
        judge = judge_layout(request.gpus)
        found["discriminator"] = {
            "parallel": Parallel(expert=judge.expert).model_dump(mode="json"),
            "recompute": RecomputeSection(granularity="full", vision=True).model_dump(mode="json"),
        }
        found["discriminator_optimizer"] = {"offload": candidate.offload}
    if candidate.engine is not None:
        found["rollout"] = _rollout(candidate)
    return found


def to_yaml(values: dict[str, Any], comment: str) -> str:
    """Lists in one line, nothing sorted, the comment above."""
    lines = "".join(f"# {line}\n" for line in comment.splitlines())
    return lines + yaml.dump(values, sort_keys=False, default_flow_style=None, width=100)


def _parallel(candidate: Candidate) -> dict[str, Any]:
    sizes = asdict(candidate.layout)
    del sizes["sequence_parallel"]
    return Parallel(**sizes).model_dump(mode="json")


def _recompute(candidate: Candidate) -> dict[str, Any]:
    found: dict[str, Any] = RecomputeSection(**asdict(candidate.recompute)).model_dump(mode="json")
    return found


def _rollout(candidate: Candidate) -> dict[str, Any]:
    request, engine = candidate.request, candidate.engine
    assert engine is not None
    nodes = max(1, request.gpus // NODE)
    share = (engine.weights + engine.cache) / (request.gpu.gigabytes * 1e9)
    return {
        "kind": "sglang",
        "engines": request.gpus // engine.tensor,
        "nodes": nodes,
        "tensor": engine.tensor,
        "gpus": list(range(request.gpus // nodes)),
        "sleep": True,
        "server_args": [f"--mem-fraction-static={int(100 * share) / 100}"],
    }
