"""What each rank does in the layout tests; every function runs inside an initialised world."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from model_providers import backend as backends
from model_providers.architecture import Qwen3VLConfig
from model_providers.config import DEFAULT_OPTIONS, TrainingOptions
from model_providers.parallel import Layout, ParallelState
from model_providers.qwen3_vl import Head, Qwen3VLModel
from model_providers.weight_map import load_hf_weights
from model_providers.weight_plan import iter_hf_weights
from prism_megatron.config.schema import Optimizer
from prism_megatron.training.runner import ModelRunner
from prism_megatron.types import PackedBatch, Sequence, VisualInputs
from tests.tiny_models import IMAGE, VIDEO, VISION_END, VISION_START

PATCH_DIM = 3 * 2 * 8 * 8
PARTS = ("language", "vision", "mergers")

FREEZES = [("language",), ("vision",), ("mergers",)] + [
    tuple(part for part in PARTS if part != trained) for trained in PARTS
]


def part_of(name: str) -> str:
    """Which of PARTS a Hugging Face weight belongs to."""
    if not name.startswith("model.visual."):
        return "language"
    return "mergers" if "merger" in name else "vision"


def image(key: str, height: int, width: int) -> VisualInputs:
    """A random image of height x width patches, the same for the same key."""
    return video(key, 1, height, width)


def video(key: str, frames: int, height: int, width: int) -> VisualInputs:
    """The same of several frames."""
    generator = torch.Generator().manual_seed(sum(map(ord, key)))
    pixels = torch.randn(frames * height * width, PATCH_DIM, generator=generator)
    return VisualInputs(key, pixels, (frames, height, width))


def sequence(seed: int, length: int, *visuals: VisualInputs) -> Sequence:
    """Images and videos first, then random text; the last half of the text is the response.

    Each frame of a video has its timestamp, two tokens, before it.
    """
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = [5]
    for each in visuals:
        frames, height, width = each.grid_thw
        token = IMAGE if frames == 1 else VIDEO
        for second in range(frames):
            ids += [7, second + 10] if token == VIDEO else []
            ids += [VISION_START] + [token] * (height * width // 4) + [VISION_END]
    start = len(ids) + length // 2
    ids += torch.randint(0, VISION_START, (length,), generator=generator).tolist()
    mask = torch.arange(len(ids)) >= start
    weight = torch.rand(len(ids), generator=generator) + 0.5
    images = tuple(each for each in visuals if each.grid_thw[0] == 1)
    videos = tuple(each for each in visuals if each.grid_thw[0] > 1)
    return Sequence(torch.tensor(ids), images, mask, {"weight": weight}, videos)


def mixed_batch() -> list[Sequence]:
    """Images of different sizes, one shared by two sequences, text only in between; both sections,
    which only a dedicated discriminator tells apart."""
    wide, tall, square = image("wide", 4, 6), image("tall", 8, 2), image("square", 2, 2)
    sequences = [
        sequence(1, 9, wide),
        sequence(2, 13),
        sequence(3, 7, tall, square),
        sequence(4, 11, wide),
        sequence(5, 6),
        sequence(6, 10, square),
    ]
    sections = (0, 1, 1, 0, 1, 1)
    return [replace(s, section=section) for s, section in zip(sequences, sections, strict=True)]


def video_batch() -> list[Sequence]:
    """A video before an image and after one, shared videos and images, text only in between."""
    wide, square = image("wide", 4, 6), image("square", 2, 2)
    clip, film = video("clip", 3, 4, 2), video("film", 2, 2, 6)
    return [
        sequence(1, 9, clip, wide),
        sequence(2, 5),
        sequence(3, 7, square, film, clip, wide),
        sequence(4, 8, film),
    ]


def spread_batch() -> list[Sequence]:
    """Seven sequences with images where SPREAD wants them."""
    wide, tall, square = image("wide", 4, 6), image("tall", 8, 2), image("square", 2, 2)
    return [
        sequence(1, 9, tall, square),
        sequence(2, 13),
        sequence(3, 7, wide),
        sequence(4, 11, wide),
        sequence(5, 6),
        sequence(6, 10),
        sequence(7, 8, square, wide),
    ]


def text_batch() -> list[Sequence]:
    """The same without images."""
    return [sequence(seed, 5 + seed) for seed in range(1, 8)]


SPREAD = {
    2: [[[0], [2], [4], []], [[1], [3], [5], [6]]],
    4: [[[0], [2], [], []], [[1], [3], [4], []], [[], [], [], [6]], [[], [], [5], []]],
}
"""By data-parallel size, the sequences of spread_batch in each rank's micro-batches: all images on
the first rank, the same one on two ranks, none at all, all on a rank beside one without tokens."""


BATCHES = {
    "images": mixed_batch,
    "videos": video_batch,
    "spread": spread_batch,
    "text": text_batch,
}


def weighted_loss(tokens: float) -> Any:
    """Sum of weighted log-probabilities of the response over a global count."""

    def loss(output: Tensor, batch: PackedBatch) -> tuple[Tensor, dict[str, Tensor]]:
        value = -(output * batch.loss_mask * batch.per_token["weight"]).sum() / tokens
        return value, {"loss": value.detach()}

    return loss


def final_score_loss(output: Tensor, batch: PackedBatch) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum of squared scores at each sequence's last token."""
    ends = batch.cu_seqlens[1 : batch.num_sequences + 1].long() - 1
    value = (output[ends] ** 2).sum()
    return value, {"loss": value.detach()}


@cache
def parallel_state(layout: Layout) -> ParallelState:
    """The layout's groups in this world. Gloo gives every group threads, so checks share them."""
    return ParallelState.create(layout)


def head_weights(config: Qwen3VLConfig) -> dict[str, Tensor]:
    """Random weights of the model's value head or heads."""
    generator = torch.Generator().manual_seed(11)
    return {
        name: torch.randn(1, config.hidden_size, generator=generator) for name in config.value_heads
    }


def make_runner(
    path: Path,
    layout: Layout,
    head: Head = "language",
    micro_batch_tokens: int = 64,
    training: TrainingOptions = DEFAULT_OPTIONS,
    freeze: tuple[str, ...] = (),
    optimizer: Optimizer | None = None,
    dtype: torch.dtype = torch.float32,
) -> ModelRunner:
    backend = replace(backends.create("cpu"), dtype=dtype)
    parallel = parallel_state(layout)
    backend.seed(7, parallel)
    config = Qwen3VLConfig.from_hf(path)
    model = Qwen3VLModel(config, parallel, backend, head, training)
    weights = load_file(path / "model.safetensors")
    if head == "score":
        weights |= head_weights(config)
    load_hf_weights(model, weights, str(path))
    model.freeze(**{part: part in freeze for part in PARTS})
    return ModelRunner(
        model,
        micro_batch_tokens=micro_batch_tokens,
        pad_id=0,
        optimizer=optimizer or Optimizer(lr=1e-3),
        steps=10,
    )


def gradients(
    path: Path,
    layout: Layout,
    head: Head = "language",
    shown: str = "images",
    **options: Any,
) -> tuple[float, float, dict[str, Tensor]]:
    """Loss, router loss and the gradient of every parameter under its Hugging Face name.

    Only rank 0 returns the gradients.
    """
    runner = make_runner(path, layout, head, **options)
    batch = BATCHES[shown]()
    finalize = runner.model.config.finalize_model_grads_func
    runner.model.config.finalize_model_grads_func = lambda models, tokens, **kwargs: finalize(
        # every rank keeps the whole gradient instead of its optimizer shard
        models,
        tokens,
        **(kwargs | {"force_all_reduce": True}),
    )
    runner.model.train()
    for chunk in runner.ddp:
        chunk.zero_grad_buffer()
    tokens = float(sum(s.response_mask.sum() for s in batch))
    loss = weighted_loss(tokens) if head == "language" else final_score_loss
    sums = runner.forward_backward(batch, loss)
    grads = dict(iter_hf_weights(runner.model, read=_gradient))
    if torch.distributed.get_rank() != 0:
        grads = {}
    return sums["loss"], sums.get("aux_loss", 0.0), grads


def _gradient(parameter: torch.nn.Parameter) -> Tensor:
    grad = getattr(parameter, "main_grad", None)
    return torch.zeros_like(parameter) if grad is None else grad.detach().clone()
