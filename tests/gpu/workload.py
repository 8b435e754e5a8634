"""The benchmarks' work: random rows of 1,024 to 4,096 tokens with one 896 x 896 image each."""

from __future__ import annotations

import importlib.metadata
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from model_providers.config import Qwen3VLConfig
from model_providers.qwen3_vl import Qwen3VLModel
from prism_megatron.flops import training_flops
from prism_megatron.types import Sequence, VisualInputs

GRID = (1, 56, 56)
SHORTEST, LONGEST = 1024, 4096
PEAK_TFLOPS = 989.0
"""Dense BF16 of an H100 or H200 by NVIDIA's datasheet."""


def rows(config: Qwen3VLConfig, count: int, seed: int) -> list[Sequence]:
    """`count` sequences, image first; the last half of the text is the response."""
    generator = torch.Generator().manual_seed(seed)
    merge = config.vision.spatial_merge_size
    visual = GRID[1] * GRID[2] // merge**2
    sequences = []
    for number in range(count):
        length = int(torch.randint(SHORTEST, LONGEST + 1, (1,), generator=generator))
        text = torch.randint(1000, config.image_token_id - 1000, (length,), generator=generator)
        text[1 : 1 + visual] = config.image_token_id
        pixels = torch.randn(GRID[1] * GRID[2], config.vision.patch_dim, generator=generator)
        mask = torch.arange(length) >= (length + visual) // 2
        image = VisualInputs(f"{seed}/{number}", pixels.to(torch.bfloat16), GRID)
        sequences.append(Sequence(text, (image,), mask))
    return sequences


def randomise(model: Qwen3VLModel) -> None:
    """Random weights, as a checkpoint would otherwise bring them."""
    for name, parameter in model.named_parameters():
        norm = "norm" in name and name.endswith("weight")
        parameter.data.normal_(1.0 if norm else 0.0, 0.0 if norm else 0.02)


def throughput(
    config: Qwen3VLConfig, batches: list[list[Sequence]], seconds: list[float], world: int
) -> dict[str, Any]:
    """Rates a GPU at the median step; `batches` and `seconds` belong to the same steps."""
    tokens, tflops, parts = [], [], []
    for batch, time in zip(batches, seconds, strict=True):
        flops = training_flops(config, map(len, batch), [GRID] * len(batch))
        tokens.append(sum(map(len, batch)) / time / world)
        tflops.append(flops.total / time / world / 1e12)
        parts.append([flops.text, flops.attention, flops.vision])
    shares = torch.tensor(parts).sum(0)
    shares /= shares.sum()
    rate = statistics.median(tflops)
    return {
        "step_s": statistics.median(seconds),
        "steps_s": seconds,
        "tokens_per_s_per_gpu": statistics.median(tokens),
        "tflops_per_gpu": rate,
        "mfu": rate / PEAK_TFLOPS,
        "flops_shares": dict(zip(("text", "attention", "vision"), shares.tolist(), strict=True)),
        "tokens_per_step": sum(map(len, batches[-1])),
        "peak_memory_gib": torch.accelerator.max_memory_allocated() / 2**30,
    }


def environment() -> dict[str, Any]:
    """Versions, device and commit of a result."""
    versions = {}
    for name in ("torch", "megatron-core", "transformer-engine", "transformers"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    root = Path(__file__).parents[2]
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False
    ).stdout.strip()
    return {"versions": versions, "device": torch.cuda.get_device_name(), "git_commit": commit}


def table(folder: Path) -> str:
    """The training steps measured in `folder`, as Markdown."""
    lines = [
        "| run | GPUs | tokens/s/GPU | TFLOP/s/GPU | MFU | peak memory, GiB |",
        "|---|---|---|---|---|---|",
    ]
    for file in sorted(folder.glob("*.json")):
        result = json.loads(file.read_text())
        if "tflops_per_gpu" in result:
            lines.append(
                f"| {file.stem} | {result['gpus']} | {result['tokens_per_s_per_gpu']:,.0f} | "
                f"{result['tflops_per_gpu']:.0f} | {100 * result['mfu']:.1f} % | "
                f"{result['peak_memory_gib']:.0f} |"
            )
    return "\n".join(lines)


def parity(folder: Path) -> tuple[str, bool]:
    """Layouts against one GPU, as Markdown, and whether all are near: loss to 1e-3, gradient norm
    to 3 percent. The file of one GPU is parity-1.json."""
    lines = ["| layout | model | loss, relative | gradient norm, relative |", "|---|---|---|---|"]
    one = json.loads((folder / "parity-1.json").read_text())
    near = True
    for file in sorted(folder.glob("parity-*.json")):
        result = json.loads(file.read_text())
        for head in ("language", "score"):
            loss, norm = (
                abs(result[head][key] / one[head][key] - 1) for key in ("loss", "grad_norm")
            )
            lines.append(
                f"| {file.stem.removeprefix('parity-')} | {head} | {loss:.1e} | {norm:.1e} |"
            )
            near &= loss <= 1e-3 and norm <= 0.03
    return "\n".join(lines), near


def main(folder: Path) -> int:
    print(table(folder))
    if not (folder / "parity-1.json").exists():
        return 0
    text, near = parity(folder)
    print(text)
    return 0 if near else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
