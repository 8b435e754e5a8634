"""Pairs for the discriminator warm-up: the student's answers beside the teacher's.

prompts --> sampled by the policy (sampling.py) --> well-formed responses --> pairwise JSONL
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from prism_megatron.config import schema
from prism_megatron.data.rows import (
    TEACHER_SECTIONS,
    PairRow,
    PromptRow,
    RowError,
    check_pair,
    read_prompts,
    write_pairs,
)
from prism_megatron.data.sources import Source, open_sources
from prism_megatron.data.stream import Quarantine
from prism_megatron.objectives.sections import Sections, sections_of, split_sections
from prism_megatron.pipelines.sampling import open_engines, sample
from prism_megatron.rollout.fleet import Fleet


def run(config: schema.MakeWarmupPairs) -> None:
    """Write config.out, one line for each well-formed response that differs from the teacher's."""
    make_pairs(config, open_engines(config))


def make_pairs(config: schema.MakeWarmupPairs, engines: Fleet) -> None:
    """The same with engines that have the policy's weights."""
    quarantine = Quarantine(config.run.dir / "quarantine.jsonl", config.data.max_bad_share)
    sources = open_sources(config.data, partial(read_prompts, required=TEACHER_SECTIONS))
    written = write_pairs(config.out, _pairs(config, sources, engines, quarantine))
    print(
        f"{config.out}: {written} pairs from {sum(map(len, sources))} prompts with "
        f"{config.sampling.n} responses each; the others were ill-formed or equal to the "
        "teacher's, from which nothing can be learned"
    )
    print(quarantine.summary())
    if not written:
        raise ValueError(
            "no response is well-formed and different from the teacher's; train the policy longer, "
            "or sample more responses a prompt"
        )


def _pairs(
    config: schema.MakeWarmupPairs,
    sources: list[Source[PromptRow]],
    engines: Fleet,
    quarantine: Quarantine,
) -> Iterator[PairRow]:
    for sampled in sample(config, sources, engines, quarantine, _check):
        row, teacher = sampled.row, _teacher(sampled.row)
        for number, response in enumerate(sampled.responses):
            student = split_sections(response.text) if response.finished else None
            if student is not None and student != teacher:
                yield PairRow(
                    row_id=f"{row.row_id}/{number}",
                    messages=row.messages,
                    images=row.images,
                    teacher_caption=row.teacher_caption or "",
                    student_caption=student.caption_text,
                    teacher_cot=row.teacher_cot or "",
                    student_cot=student.reasoning_text,
                )


def _check(row: PromptRow) -> None:
    """RowError if no pair could be made of the row, whatever the policy answers."""
    check_pair(row)
    _teacher(row)


def _teacher(row: PromptRow) -> Sections:
    """RowError if the teacher's sections are ill-formed."""
    teacher = sections_of(row.teacher_caption or "", row.teacher_cot or "")
    if teacher is None:
        raise RowError("teacher_caption and teacher_cot do not make up a well-formed response")
    return teacher
