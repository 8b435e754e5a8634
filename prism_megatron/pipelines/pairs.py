"""Pairs for the discriminator warm-up: the student's answers beside the teacher's.

prompts parquet --> sampled by the policy --> well-formed responses --> pairwise JSONL
"""

from __future__ import annotations

from collections.abc import Iterator

from rich.progress import track

from prism_megatron.config import schema
from prism_megatron.data.prompts import PromptEncoder
from prism_megatron.data.rows import (
    PairRow,
    PromptRow,
    Quarantine,
    convert_all,
    read_prompts,
    write_pairs,
)
from prism_megatron.objectives.sections import (
    response_text,
    sections_of,
    split_sections,
    token_bytes,
)
from prism_megatron.rollout.local import LocalEngine
from prism_megatron.types import Prompt


def run(config: schema.Pairs) -> None:
    """Write config.out, one line for each well-formed response that differs from the teacher's."""
    encoder = PromptEncoder.from_config(config.model, config.data)
    quarantine = Quarantine(config.run.dir / "quarantine.jsonl", config.data.max_bad_share)
    rows = read_prompts(config.data.path, required=("teacher_caption", "teacher_cot"))
    tasks = convert_all(rows, lambda row: (row, encoder.encode_prompt(row)), quarantine)
    quarantine.check(len(rows))
    engine = LocalEngine(config.model, seed=config.run.seed)
    written = write_pairs(config.out, _pairs(config, encoder, engine, tasks))
    sampled = len(tasks) * config.sampling.n
    print(
        f"{config.out}: {written} pairs from {sampled} responses; the others were ill-formed or "
        "equal to the teacher's, from which nothing can be learned"
    )
    print(quarantine.summary())
    if not written:
        raise ValueError(
            "no response is well-formed and different from the teacher's; train the policy longer, "
            "or sample more responses a prompt"
        )


def _pairs(
    config: schema.Pairs,
    encoder: PromptEncoder,
    engine: LocalEngine,
    tasks: list[tuple[PromptRow, Prompt]],
) -> Iterator[PairRow]:
    table = token_bytes(encoder.tokenizer)
    size = max(1, config.sampling.batch_size // config.sampling.n)
    for first in track(range(0, len(tasks), size), description="pairs"):
        chunk = tasks[first : first + size]
        for (row, _), group in zip(
            chunk, engine.generate([p for _, p in chunk], config.sampling, first), strict=True
        ):
            for number, rollout in enumerate(group):
                text = response_text(rollout.ids, table, (encoder.end_id,))
                student = split_sections(text) if rollout.finish_reason == "stop" else None
                teacher = sections_of(row.teacher_caption or "", row.teacher_cot or "")
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
