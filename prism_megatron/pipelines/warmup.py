"""Discriminator warm-up: Bradley-Terry on caption pairs and reasoning pairs, or on whole responses.

pairs JSONL --> (prompt + teacher section, prompt + student section) --> scores --> update
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import batched

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

REFERENCE_BATCH = 4
"""Pairs that the reference scores at once on a GPU (train_moe_vl_warmup_fast.py: BATCH_SIZE)."""


@dataclass(frozen=True)
class Pair:
    """The answers of one row, ready to score: a sequence for each stream of the discriminator."""

    teacher: dict[str, Sequence]
    student: dict[str, Sequence]


def run(config: schema.Warmup) -> None:
    """Train the discriminator config.model and export it to run.dir/hf, with what it was shown."""
    backend = start(config)
    encoder = build_encoder(config.model.path, config.data)
    reader = discriminator.Reader(
        encoder, config.model, line_end=config.section_ends == "reference"
    )
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
    described = discriminator.record_shown(config.model, config.run.dir / "discriminator")
    loop = TrainingLoop(
        config, {"discriminator": (model, described)}, stream, quarantine, shown="accuracy"
    )
    loop.resume()
    if loop.run(lambda: step(model, stream.next_batch(), config, loop.step)):
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


def step(model: ModelRunner, pairs: list[Pair], config: schema.Warmup, number: int) -> Metrics:
    """Score, compare, update; caption and reasoning pairs weigh the same."""
    section, streams = config.model, list(pairs[0].teacher)
    teachers = [pair.teacher[name] for name in streams for pair in pairs]
    students = [pair.student[name] for name in streams for pair in pairs]
    if config.last_token == "reference":
        teachers, students = scored_as_the_reference(teachers, students, number)
    sequences = [*teachers, *students]
    if section.score_dropout == "reference":
        sequences = discriminator.dropped_out(sequences, number)
    scores = discriminator.score(model, sequences)

    def sides(scores: Tensor) -> Tensor:
        """[teacher or student, pair of any stream], within their bound."""
        return bound_scores(scores, section.score_bound, section.score_limit).view(2, -1)

    def objective(scores: Tensor) -> Tensor:
        teacher, student = sides(scores)
        return bradley_terry_loss(teacher, student, num_pairs=len(teacher))[0]

    result = discriminator.update(model, sequences, scores, model.loads, objective)
    gaps = sides(scores)[0] - sides(scores)[1]
    accuracy = {
        f"{name}_accuracy": discriminator.accuracy(list(teacher), list(student), gap)
        for name, teacher, student, gap in zip(
            streams,
            batched(teachers, len(pairs)),
            batched(students, len(pairs)),
            gaps.split(len(pairs)),
            strict=True,
        )
    }
    return {
        "loss": float(objective(scores)),
        "accuracy": sum(accuracy.values()) / len(accuracy),
        **accuracy,
        "score_gap": float(gaps.mean()),
        "grad_norm": result.grad_norm,
        **result.sums,
    }


def scored_as_the_reference(
    teachers: list[Sequence], students: list[Sequence], number: int
) -> tuple[list[Sequence], list[Sequence]]:
    """Pairs, in the same order, with the tokens at which last_token=reference scores them.

    There four pairs drawn at random, captions and reasoning together, are filled up on the left to
    the longest of their eight sequences, of L tokens. A side whose first sequence has L tokens is
    taken for one that is filled up on the right, so that a sequence of l tokens is read at place
    l - 1 of its row, which is its token 2 l - L - 1. Where that lies in the padding, its first
    token stands in, whose score says as little of the answer. number: of the step, for the draw.
    """
    order = torch.randperm(len(teachers), generator=torch.Generator().manual_seed(number))
    teachers, students = list(teachers), list(students)
    for members in batched(order.tolist(), REFERENCE_BATCH):
        longest = max(len(side[i]) for side in (teachers, students) for i in members)
        for side in (teachers, students):
            if len(side[members[0]]) == longest:
                for i in members:
                    scored = max(0, 2 * len(side[i]) - longest - 1)
                    side[i] = replace(side[i], scored=scored)
    return teachers, students
