"""FP8 recipes against BF16 over the same SFT steps from the same start.

    torchrun --nproc-per-node N -m tests.gpu.fp8_curves --precision bf16 --out FILE [--model NAME]
    python -m tests.gpu.fp8_curves --plot PNG FILE ...      # BF16's file first

The model is of Qwen3-VL-8B's width, or another's, with four decoder layers. Its text is a random
walk on a graph of tokens with four successors each, behind an image, so that there is something to
learn: the loss falls from ln(vocabulary) towards ln 4 = 1.39.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from model_providers import backend as backends
from model_providers.config import Precision, TrainingOptions
from model_providers.parallel import Layout, ParallelState
from model_providers.presets import PRESETS
from model_providers.qwen3_vl import Qwen3VLModel
from prism_megatron.bench import workload
from prism_megatron.config.schema import Optimizer
from prism_megatron.training.runner import ModelRunner
from prism_megatron.types import PackedBatch, Sequence, VisualInputs

LAYERS, TOKENS, SUCCESSORS = 4, 2048, 4
ROWS, LENGTH, GRID = 16, 1024, (1, 16, 16)
WINDOW = 10
RECIPES = ("bf16", "delayed", "tensorwise", "blockwise")


def batch(number: int, patch_dim: int, image_token: int) -> list[Sequence]:
    graph = torch.randint(TOKENS, (TOKENS, SUCCESSORS), generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(1000 + number)
    steps = torch.randint(SUCCESSORS, (ROWS, LENGTH), generator=generator)
    walk = [torch.randint(TOKENS, (ROWS,), generator=generator)]
    for step in range(1, LENGTH):
        walk.append(graph[walk[-1], steps[:, step]])
    ids = torch.stack(walk, dim=1)
    visual = GRID[1] * GRID[2] // 4
    ids[:, 1 : 1 + visual] = image_token
    mask = torch.arange(LENGTH) > 1 + visual
    pixels = torch.randn(ROWS, GRID[1] * GRID[2], patch_dim, generator=generator)
    return [
        Sequence(row, (VisualInputs(f"{number}/{i}", pixels[i], GRID),), mask)
        for i, row in enumerate(ids)
    ]


def train(name: str, precision: str, steps: int) -> list[float]:
    backend = backends.create("cuda")
    backend.init_process_group()
    parallel = ParallelState.create(Layout())
    backend.seed(1, parallel)
    config = replace(PRESETS[name], num_layers=LAYERS)
    chosen = Precision() if precision == "bf16" else Precision(fp8=precision)  # type: ignore[arg-type]
    model = Qwen3VLModel(config, parallel, backend, options=TrainingOptions(precision=chosen))
    model.to(backend.device)
    workload.randomise(model)
    runner = ModelRunner(
        model,
        micro_batch_tokens=ROWS * LENGTH,
        pad_id=0,
        optimizer=Optimizer(lr=1e-4, warmup_steps=20),
        steps=steps,
    )
    losses = []
    for number in range(steps):
        rows = batch(number, config.vision.patch_dim, config.image_token_id)
        tokens = float(sum(row.response_mask.sum() for row in rows))

        def loss(output: Tensor, packed: PackedBatch, count: float = tokens) -> Any:
            value = -(output * packed.loss_mask).sum() / count
            return value, {"loss": value.detach()}

        losses.append(runner.train_step(rows, loss).sums["loss"])
        if dist.get_rank() == 0 and number % 20 == 0:
            print(f"{precision} step {number}: loss {losses[-1]:.4f}", flush=True)
    return losses


def smoothed(losses: list[float]) -> Tensor:
    return torch.tensor(losses).unfold(0, WINDOW, 1).mean(-1)


def furthest(losses: list[float], reference: list[float]) -> float:
    """Largest relative distance of two curves, each a running mean over WINDOW steps."""
    found, wanted = smoothed(losses), smoothed(reference)
    return float(((found - wanted).abs() / wanted).max())


def plot(out: Path, files: Iterable[Path]) -> None:
    from matplotlib.figure import Figure

    results = [json.loads(file.read_text()) for file in files]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for result in results:
        distance = furthest(result["losses"], results[0]["losses"])
        label = f"{result['precision']} ({100 * distance:.2f} % off)"
        axes.plot(smoothed(result["losses"]), label=label, linewidth=1)
    title = f"SFT steps in FP8, {LAYERS} layers of {results[0]['model']}"
    axes.set(xlabel="step", ylabel=f"loss, mean of {WINDOW} steps", title=title)
    axes.legend()
    figure.savefig(out, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=PRESETS, default="qwen3-vl-8b")
    parser.add_argument("--precision", choices=RECIPES, default="bf16")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("files", nargs="*", type=Path)
    options = parser.parse_args()
    if options.plot:
        plot(options.plot, options.files)
        return
    losses = train(options.model, options.precision, options.steps)
    result = {"model": options.model, "precision": options.precision}
    result |= {"layers": LAYERS, "losses": losses}
    if dist.get_rank() == 0:
        options.out.write_text(
            json.dumps(result | workload.environment(backends.create("cuda")), indent=1) + "\n"
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
