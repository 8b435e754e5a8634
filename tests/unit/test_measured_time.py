"""Steps that were timed on H200s (docs/results/h200), against what is estimated."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from model_providers.memory import Recompute
from model_providers.parallel import Layout
from model_providers.presets import PRESETS
from prism_megatron.flops import training_flops
from prism_megatron.planner.hardware import H200
from prism_megatron.planner.step_time import Options, StepTime, Work, estimate, micro_batch

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results" / "h200"
STEPS = {
    path.stem: found
    for kind in ("dense", "host", "moe", "save")
    for path in sorted(RESULTS.glob(f"{kind}-*.json"))
    if "step_s" in (found := json.loads(path.read_text()))
}
LAYERS = json.loads((RESULTS / "decoder.json").read_text())
DENSE, MOE = PRESETS["qwen3-vl-8b"], PRESETS["qwen3-vl-30b-a3b"]
# lengths are uniform from 1,024 to 4,096, and an image has 56 x 56 patches
SQUARE, PATCHES = (4096**3 - 1024**3) / (3 * 3072), 56 * 56


@pytest.mark.parametrize("name", STEPS)
def test_a_measured_step_is_estimated(name: str) -> None:
    run = STEPS[name]
    gpus, rows = run["gpus"], run["gpus"] * run["rows_per_gpu"]
    tokens = run["tokens_per_s_per_gpu"] * run["step_s"] * gpus
    layout = Layout(**run["layout"])
    micro_batches = math.ceil(tokens / layout.data(gpus) / run["micro_batch_tokens"])
    found = estimate(
        replace(PRESETS[run["model"]], num_layers=run["layers"]),
        layout,
        gpus,
        Work(tokens, rows * SQUARE, rows, PATCHES, micro_batches),
        H200,
        Options(
            fp8=run["fp8"] != "off",
            offload=run.get("offload", False),
            moment_bytes=2 if run["moments"] == "bfloat16" else 4,
        ),
    )
    assert found.total == pytest.approx(run["step_s"], rel=0.25)


def test_steps_on_one_two_and_four_gpus_were_measured() -> None:
    assert {run["gpus"] for run in STEPS.values()} == {1, 2, 4}


@pytest.mark.parametrize(
    "run", LAYERS["runs"], ids=lambda r: f"{r['model']}-tp{r['tensor']}-ep{r['expert']}-{r['fp8']}"
)
def test_measured_layers_are_estimated(run: dict[str, Any]) -> None:
    """One, two and four GPUs, without an optimizer."""
    config = replace(PRESETS[run["model"]], num_layers=run["layers"])
    layout = Layout(tensor=run["tensor"], expert=run["expert"], sequence_parallel=run["tensor"] > 1)
    data, length = layout.data(run["gpus"]), LAYERS["tokens"]
    work = Work(data * length, data * length**2, 0, 0, 1)
    options = Options(fp8=run["fp8"] != "off", head=False)
    seconds = micro_batch(config, layout, run["gpus"], 0, work, H200, options).total
    flops = training_flops(config, [length] * data, [], head=False).total
    assert flops / seconds / run["gpus"] / 1e12 == pytest.approx(run["tflops_per_gpu"], rel=0.25)


def step(config: Any, layout: Layout, world: int, **options: Any) -> StepTime:
    count = options.pop("micro_batches", 8)
    work = Work(64 * 8192, 64 * 8192**2, 64, 4096, count)
    return estimate(config, layout, world, work, H200, Options(**options))


def test_products_and_attention_are_those_of_the_flop_count() -> None:
    """Recomputation adds a forward pass of what it repeats."""
    found = step(DENSE, Layout(), 8)
    flops = training_flops(DENSE, [8192] * 64, [(1, 64, 64)] * 64).total / 8
    assert found.bounds.compute < flops / (0.24 * H200.bf16)
    assert found.bounds.compute > flops / (0.8 * H200.bf16)
    again = step(DENSE, Layout(), 8, recompute=Recompute("full", vision=True))
    head = 6 * 64 * 8192 * DENSE.hidden_size * DENSE.vocab_size / 8 / (0.8 * H200.bf16)
    wanted = (found.bounds.compute - head) * 4 / 3 + head
    assert again.bounds.compute == pytest.approx(wanted)


def test_small_micro_batches_wait_for_the_host() -> None:
    few, many = (step(DENSE, Layout(), 8, micro_batches=n) for n in (8, 64))
    assert many.bounds.host == pytest.approx(8 * few.bounds.host)
    assert few.bounds.host < few.total < many.bounds.host == many.total


def test_a_bubble_shrinks_with_micro_batches_and_virtual_stages() -> None:
    # 36 layers of 4 stages; the slowest takes t for a micro-batch
    one = step(DENSE, Layout(pipeline=4), 4)
    work = one.total - one.bubble - one.update - one.gradients - one.pipeline
    assert one.bubble == pytest.approx(work / 8 * 3)
    assert step(DENSE, Layout(pipeline=4), 4, micro_batches=32).bubble < one.bubble / 3
    virtual = step(DENSE, Layout(pipeline=4, virtual_pipeline=3), 4)
    assert virtual.bubble == pytest.approx(one.bubble / 3)
    assert step(DENSE, Layout(), 4).bubble == 0


def test_what_leaves_the_host_is_the_networks() -> None:
    inside = step(MOE, Layout(expert=8), 8).bounds
    assert inside.network == 0 and inside.nvlink > 0
    # gradients of the rest, and of the experts' second copy
    two_hosts = step(MOE, Layout(expert=8), 16).bounds
    assert two_hosts.network > 0
    across = step(MOE, Layout(expert=16), 16)
    assert across.bounds.network > 5 * two_hosts.network
    assert across.experts > 2 * step(MOE, Layout(expert=8), 16).experts
    stages = step(DENSE, Layout(pipeline=2), 16)
    assert stages.bounds.network > step(DENSE, Layout(), 8).bounds.network


def test_offload_waits_for_the_host() -> None:
    plain, offloaded = step(DENSE, Layout(), 2), step(DENSE, Layout(), 2, offload=True)
    # 12 bytes of half of the weights, there and back at the same time, at 45 GB/s
    assert plain.update < 0.1 < offloaded.update
    assert offloaded.update == pytest.approx(6 * 8.767e9 / 45e9, rel=0.05)
