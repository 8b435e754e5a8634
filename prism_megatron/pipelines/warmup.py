"""Discriminator warm-up: Bradley-Terry on caption pairs and reasoning pairs.

pairs JSONL --> (prompt + teacher section, prompt + student section) --> scores --> update
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prism_megatron.config import schema
from prism_megatron.data.prompts import PromptEncoder
from prism_megatron.data.rows import BatchStream, PairRow, RowError, read_pairs
from prism_megatron.objectives.losses import bradley_terry_loss
from prism_megatron.objectives.sections import sections_of
from prism_megatron.training import discriminator
from prism_megatron.training.loop import Metrics, TrainingLoop
from prism_megatron.training.runner import ModelRunner
from prism_megatron.training.setup import build_encoder, build_runner, open_quarantine, start
from prism_megatron.types import Sequence


@dataclass(frozen=True)
class Pair:
    """The sections of one row, ready to score."""

    teacher_caption: Sequence
    student_caption: Sequence
    teacher_reasoning: Sequence
    student_reasoning: Sequence


def run(config: schema.Warmup) -> None:
    """Train the discriminator config.model and export it to run.dir/hf."""
    backend = start(config.backend, config.model)
    encoder = build_encoder(config.model.path, config.data)
    quarantine = open_quarantine(config.run, config.data)

    stream = BatchStream(
        read_pairs(config.data.path),
        lambda row: pair(encoder, row),
        quarantine,
        batch_size=config.batch_size,
        seed=config.run.seed,
    )
    model = build_runner(
        config.model,
        config.optimizer,
        backend,
        config.train,
        config.run,
        pad_id=encoder.pad_id,
        head="score",
        aux_loss_coef=config.aux_loss_coef,
        z_loss_coef=config.z_loss_coef,
    )
    loop = TrainingLoop(
        config, {"discriminator": (model, config.model.path)}, stream, quarantine, shown="accuracy"
    )
    loop.resume()
    if loop.run(lambda: step(model, stream.next_batch())):
        loop.export("discriminator")


def pair(encoder: PromptEncoder, row: PairRow) -> Pair:
    """RowError if one side is not a well-formed response."""
    teacher = sections_of(row.teacher_caption, row.teacher_cot)
    student = sections_of(row.student_caption, row.student_cot)
    if teacher is None or student is None:
        raise RowError("caption and cot do not make up a well-formed response")
    prompt = encoder.encode_prompt(row)
    sides = (teacher, student)
    texts = [s.caption_text for s in sides] + [s.reasoning_text for s in sides]
    return Pair(*(encoder.section_sequence(prompt, text) for text in texts))


def step(model: ModelRunner, pairs: list[Pair]) -> Metrics:
    """Score, compare, update; caption and reasoning pairs weigh the same."""
    count = len(pairs)
    captions = [p.teacher_caption for p in pairs], [p.student_caption for p in pairs]
    reasoning = [p.teacher_reasoning for p in pairs], [p.student_reasoning for p in pairs]
    sequences = [*captions[0], *captions[1], *reasoning[0], *reasoning[1]]
    scores = discriminator.score(model, sequences)

    def objective(scores: Tensor) -> Tensor:
        return sum(loss for loss, _ in streams(scores)) / 2

    def streams(scores: Tensor) -> list[tuple[Tensor, dict[str, Tensor]]]:
        caption, reasoning = scores.view(2, 2, count)
        return [bradley_terry_loss(*stream, num_pairs=count) for stream in (caption, reasoning)]

    result = discriminator.update(model, sequences, scores, objective)
    losses, sums = zip(*streams(scores), strict=True)
    accuracy = [
        discriminator.accuracy(teachers, students, gap)
        for teachers, students, gap in (
            (captions[0], captions[1], scores[:count] - scores[count : 2 * count]),
            (reasoning[0], reasoning[1], scores[2 * count : 3 * count] - scores[3 * count :]),
        )
    ]
    return {
        "loss": float(torch.stack(losses).mean()),
        "accuracy": sum(accuracy) / 2,
        "caption_accuracy": accuracy[0],
        "reasoning_accuracy": accuracy[1],
        "score_gap": sum(float(s["gap"]) for s in sums) / (2 * count),
        "grad_norm": result.grad_norm,
        **result.sums,
    }
