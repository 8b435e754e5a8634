"""Alignment data from demonstrations, or from a teacher's responses to prompts.

rows --split_sections--> teacher_caption, teacher_cot --held out by image--> train.parquet
         `--ill-formed--> quarantine.jsonl                                   heldout.parquet
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
from rich.progress import track

from prism_megatron.config import schema
from prism_megatron.data.rows import (
    PROMPT_FIELDS,
    PromptRow,
    RowError,
    SFTRow,
    prompt_writer,
    read_prompts,
    read_sft,
    stored_images,
)
from prism_megatron.data.sources import open_sources
from prism_megatron.data.stream import Quarantine
from prism_megatron.objectives.sections import split_sections

SCHEMA = pa.schema([*PROMPT_FIELDS, ("extra_info", pa.struct([("index", pa.string())]))])
DATA_SOURCE = "mm_gad"
"""What the published alignment file has as data_source."""


def run(config: schema.MakeAlignmentSet) -> None:
    """Write config.out/train.parquet and heldout.parquet; the same seed gives the same split."""
    quarantine = Quarantine(config.run.dir / "quarantine.jsonl", config.data.max_bad_share)
    counts = {"train": 0, "heldout": 0}
    with (
        prompt_writer(config.out / "train.parquet", SCHEMA) as train,
        prompt_writer(config.out / "heldout.parquet", SCHEMA) as heldout,
    ):
        for item in _items(config, quarantine):
            is_heldout = held_out(item, config.run.seed, config.heldout_share)
            (heldout if is_heldout else train)(item)
            counts["heldout" if is_heldout else "train"] += 1
    print(
        f"{config.out}: {counts['train']} rows to train on, {counts['heldout']} held out; "
        f"{quarantine.summary()}"
    )


def _items(config: schema.MakeAlignmentSet, quarantine: Quarantine) -> Iterator[dict[str, Any]]:
    sources: list[Any] = (
        open_sources(config.data, read_sft)
        if config.rows == "sft"
        else open_sources(config.data, read_prompts)
    )
    places = ((source, index) for source in sources for index in range(len(source)))
    for source, index in track(places, "alignment set", sum(map(len, sources))):
        try:
            yield alignment_item(source[index])
        except RowError as error:
            quarantine.add(source, index, str(error))


def alignment_item(row: SFTRow | PromptRow) -> dict[str, Any]:
    """The row as the alignment file has it; RowError if its response is ill-formed or missing.

    A demonstration's own answer is its ground truth: nothing else is known.
    """
    response = row.response if isinstance(row, SFTRow) else row.teacher_response
    if not response:
        raise RowError("missing required column 'teacher_response'")
    sections = split_sections(response)
    if sections is None:
        raise RowError(
            "malformed response: one <caption>, <think> and <answer> section each is wanted, in "
            "this order, none blank, and nothing else"
        )
    if row.messages[-1].role != "user":
        raise RowError(f"malformed prompt: it ends with a turn of role {row.messages[-1].role}")
    answer = sections.answer.strip()
    is_prompt = isinstance(row, PromptRow)
    return {
        "prompt": [{"role": turn.role, "content": turn.content} for turn in row.messages],
        "images": stored_images(row.images),
        "teacher_response": response,
        "teacher_caption": sections.caption_text,
        "teacher_cot": sections.reasoning_text,
        "data_source": (row.data_source if is_prompt else "") or DATA_SOURCE,
        "answer": answer,
        "reward_model": {
            "ground_truth": row.ground_truth if is_prompt else answer,
            "style": "rule",
        },
        "extra_info": {"index": row.row_id},
    }


def held_out(item: dict[str, Any], seed: int, share: float) -> bool:
    """Whether a row is held out: drawn by its images (by its text where it has none), so that no
    image is on both sides of the split, whatever else the data holds."""
    shown = [image["bytes"] for image in item["images"]]
    digest = hashlib.sha256(str(seed).encode())
    for part in shown or [turn["content"].encode() for turn in item["prompt"]]:
        digest.update(hashlib.sha256(part).digest())
    return int.from_bytes(digest.digest()[:8]) < share * 2**64
