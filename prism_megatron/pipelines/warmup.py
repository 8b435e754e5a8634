"""Discriminator warm-up: Bradley-Terry on caption pairs and reasoning pairs, or on whole responses.

pairs JSONL --> (prompt + teacher section, prompt + student section) --> scores --> update
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prism_megatron.config import schema
from prism_megatron.data.prompts import PromptEncoder
from prism_megatron.data.rows import PairRow, RowError, read_pairs
from prism_megatron.data.sources import open_sources
from prism_megatron.data.stream import BatchStream
from prism_megatron.objectives.losses import bound_scores, bradley_terry_loss
from prism_megatron.objectives.sections import sections_of
from prism_megatron.training import discriminator
from prism_megatron.training.loop import Metrics, TrainingLoop
from prism_megatron.training.runner import ModelRunner
from prism_megatron.training.setup import build_encoder, build_runner, open_quarantine, start
from prism_megatron.types import Sequence


@dataclass(frozen=True)
class Pair:
    """The answers of one row, ready to score: a sequence for each stream of the discriminator."""

    teacher: dict[str, Sequence]
    student: dict[str, Sequence]


def run(config: schema.Warmup) -> None:
    """Train the discriminator config.model and export it to run.dir/hf."""
    backend = start(config.backend, config.model)
    encoder = build_encoder(config.model.path, config.data)
    reader = discriminator.Reader(encoder, config.model)
    quarantine = open_quarantine(config.run, config.data)

    stream = BatchStream(
        open_sources(config.data, read_pairs),
        lambda row: pair(encoder, reader, row),
        quarantine,
        batch_size=config.batch_size,
        seed=config.run.seed,
        num_workers=config.data.num_workers,
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
    if loop.run(lambda: step(model, stream.next_batch(), config.model)):
        loop.export("discriminator")


def pair(encoder: PromptEncoder, reader: discriminator.Reader, row: PairRow) -> Pair:
    """RowError if one side is not a well-formed response."""
    teacher = sections_of(row.teacher_caption, row.teacher_cot)
    student = sections_of(row.student_caption, row.student_cot)
    if teacher is None or student is None:
        raise RowError("caption and cot do not make up a well-formed response")
    prompt = encoder.encode_prompt(row)
    return Pair(
        reader.read(prompt, teacher, teacher=True), reader.read(prompt, student, teacher=False)
    )


def step(model: ModelRunner, pairs: list[Pair], section: schema.Discriminator) -> Metrics:
    """Score, compare, update; caption and reasoning pairs weigh the same."""
    streams = {
        name: ([p.teacher[name] for p in pairs], [p.student[name] for p in pairs])
        for name in pairs[0].teacher
    }
    sequences = [sequence for sides in streams.values() for side in sides for sequence in side]
    scores = discriminator.score(model, sequences)

    def by_stream(scores: Tensor) -> Tensor:
        """[stream, teacher or student, pair], within their bound."""
        bounded = bound_scores(scores, section.score_bound, section.score_limit)
        return bounded.view(len(streams), 2, len(pairs))

    def objective(scores: Tensor) -> Tensor:
        losses = [bradley_terry_loss(*s, num_pairs=len(pairs))[0] for s in by_stream(scores)]
        return torch.stack(losses).mean()

    result = discriminator.update(model, sequences, scores, objective)
    gaps = by_stream(scores)[:, 0] - by_stream(scores)[:, 1]
    accuracy = {
        f"{name}_accuracy": discriminator.accuracy(*sides, gap)
        for (name, sides), gap in zip(streams.items(), gaps, strict=True)
    }
    return {
        "loss": float(objective(scores)),
        "accuracy": sum(accuracy.values()) / len(accuracy),
        **accuracy,
        "score_gap": float(gaps.mean()),
        "grad_norm": result.grad_norm,
        **result.sums,
    }
