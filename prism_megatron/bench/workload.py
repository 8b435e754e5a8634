"""Random weights, and random rows with one image each; what a run of them reached, and where."""

from __future__ import annotations

import statistics
from collections.abc import Sequence as Ordered
from dataclasses import dataclass
from typing import Any

import torch

from model_providers.architecture import Qwen3VLConfig
from model_providers.backend import Backend
from model_providers.fp8_weights import assign
from model_providers.qwen3_vl import Qwen3VLModel
from prism_megatron.config.load import provenance
from prism_megatron.flops import training_flops
from prism_megatron.planner.hardware import PEAK_BF16
from prism_megatron.types import Sequence, VisualInputs


@dataclass(frozen=True)
class Shape:
    """Of the rows: lengths uniform from shortest to longest, an image of side x side patches."""

    shortest: int = 1024
    longest: int = 4096
    side: int = 56

    @property
    def grid(self) -> tuple[int, int, int]:
        return 1, self.side, self.side

    def check(self, config: Qwen3VLConfig) -> None:
        """ValueError if the image does not fit the shortest row."""
        merge = config.vision.spatial_merge_size
        visual = self.side**2 // merge**2
        if self.side % merge or not 0 < visual < self.shortest <= self.longest:
            raise ValueError(
                f"rows of {self.shortest} to {self.longest} tokens with an image of {self.side} x "
                f"{self.side} patches ({visual} tokens): the side must be a multiple of {merge}, "
                "and the image smaller than the shortest row"
            )


def rows(config: Qwen3VLConfig, count: int, seed: int, shape: Shape) -> list[Sequence]:
    """`count` sequences, image first; the last half of the text is the response."""
    generator = torch.Generator().manual_seed(seed)
    visual = shape.side**2 // config.vision.spatial_merge_size**2
    # away from the control tokens at the end and, of a released vocabulary, the bytes at the start
    margin = min(1000, config.image_token_id // 4)
    sequences = []
    for number in range(count):
        length = int(torch.randint(shape.shortest, shape.longest + 1, (1,), generator=generator))
        text = torch.randint(margin, config.image_token_id - margin, (length,), generator=generator)
        text[1 : 1 + visual] = config.image_token_id
        pixels = torch.randn(shape.side**2, config.vision.patch_dim, generator=generator)
        mask = torch.arange(length) >= (length + visual) // 2
        image = VisualInputs(f"{seed}/{number}", pixels.to(torch.bfloat16), shape.grid)
        sequences.append(Sequence(text, (image,), mask))
    return sequences


def randomise(model: Qwen3VLModel) -> None:
    """Random weights, as a checkpoint would otherwise bring them."""
    for name, parameter in model.named_parameters():
        norm = "norm" in name and name.endswith("weight")
        values = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
        assign(parameter, values.normal_(1.0 if norm else 0.0, 0.0 if norm else 0.02))


def throughput(
    config: Qwen3VLConfig,
    batches: list[list[Sequence]],
    seconds: Ordered[float],
    world: int,
    device: str,
) -> dict[str, Any]:
    """Rates a GPU at the median step; `batches` and `seconds` belong to the same steps."""
    tokens, tflops, parts = [], [], []
    for batch, time in zip(batches, seconds, strict=True):
        grids = [image.grid_thw for sequence in batch for image in sequence.images]
        flops = training_flops(config, map(len, batch), grids)
        tokens.append(sum(map(len, batch)) / time / world)
        tflops.append(flops.total / time / world / 1e12)
        parts.append([flops.text, flops.attention, flops.vision])
    shares = torch.tensor(parts).sum(0)
    shares /= shares.sum()
    rate = statistics.median(tflops)
    return {
        "step_s": statistics.median(seconds),
        "steps_s": list(seconds),
        "tokens_per_s_per_gpu": statistics.median(tokens),
        "tflops_per_gpu": rate,
        "mfu": mfu(rate, device),
        "flops_shares": dict(zip(("text", "attention", "vision"), shares.tolist(), strict=True)),
        "flops_formula": "prism_megatron/flops.py: three times the forward pass, causal attention "
        "halved, images counted once, nothing for recomputation",
        "tokens_per_step": sum(map(len, batches[-1])),
    }


def mfu(tflops: float, device: str) -> float | None:
    """Share of the device's BF16 peak, in FP8 too; None of one whose peak is not known."""
    peaks = [peak for name, peak in PEAK_BF16.items() if name in device]
    return tflops * 1e12 / peaks[0] if peaks else None


def environment(backend: Backend) -> dict[str, Any]:
    """Versions, device, commit, and the most memory that this rank has had so far."""
    return {
        "peak_memory_gib": backend.peak_memory() / 2**30,
        "device": backend.device_name(),
        **provenance(),
    }
