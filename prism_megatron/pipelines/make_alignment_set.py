"""Alignment data from demonstrations, or from a teacher's responses to prompts.

rows --split_sections--> teacher_caption, teacher_cot --held out by image--> train.parquet
         `--ill-formed--> quarantine.jsonl                                   heldout.parquet

Rows are read twice: which ones share images is known after the last of them.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
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
from prism_megatron.data.sources import Source, open_sources
from prism_megatron.data.stream import Quarantine
from prism_megatron.objectives.sections import split_sections

EQUIVALENT_ANSWERS = pa.field("equivalent_answers", pa.list_(pa.string()))
DATA_SOURCE = "mm_gad"
"""What the published alignment file has as data_source."""


def run(config: schema.MakeAlignmentSet) -> None:
    """Write config.out/train.parquet and heldout.parquet; the same seed gives the same split,
    whatever the order of the rows.

    ValueError if nothing would be left to train on, or rows can't be written to one file.
    """
    quarantine = Quarantine(config.run.dir / "quarantine.jsonl", config.data.max_bad_share)
    places: list[tuple[Source[Any], int]] = []
    contents: list[list[bytes]] = []
    types: dict[pa.DataType, None] = {}
    for source, index, item, extra_info in _items(config, quarantine):
        places.append((source, index))
        contents.append(digests(item))
        types[extra_info] = None
    names = groups(contents)
    is_heldout = [drawn(name, config.run.seed, config.heldout_share) for name in names]
    if all(is_heldout):
        raise ValueError(
            f"all {len(names)} rows would be held out ({len(set(names))} groups that share no "
            "image); lower heldout_share, or choose another run.seed"
        )
    columns = _schema(types)
    with (
        prompt_writer(config.out / "train.parquet", columns) as train,
        prompt_writer(config.out / "heldout.parquet", columns) as heldout,
    ):
        for (source, index), held in zip(track(places, "writing"), is_heldout, strict=True):
            (heldout if held else train)(alignment_item(source[index]))
    print(
        f"{config.out}: {len(names) - sum(is_heldout)} rows to train on, {sum(is_heldout)} held "
        f"out, of {len(set(names))} groups that share no image, the largest of "
        f"{max(Counter(names).values())} rows; {quarantine.summary()}"
    )


def _items(
    config: schema.MakeAlignmentSet, quarantine: Quarantine
) -> Iterator[tuple[Source[Any], int, dict[str, Any], pa.DataType]]:
    """Every usable row: where it is, what becomes of it, and the type of its extra_info."""
    sources: list[Any] = (
        open_sources(config.data, read_sft)
        if config.rows == "sft"
        else open_sources(config.data, read_prompts)
    )
    places = ((source, index) for source in sources for index in range(len(source)))
    for source, index in track(places, "reading", sum(map(len, sources))):
        try:
            item = alignment_item(source[index])
            yield source, index, item, _type(item["extra_info"])
        except RowError as error:
            quarantine.add(source, index, str(error))


def _type(extra_info: dict[str, Any]) -> pa.DataType:
    """RowError if a parquet file can't hold it: lists there have values of one type."""
    try:
        # infer_type would take the type of the first value of a list for that of all
        return pa.array([extra_info]).type
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise RowError(f"malformed extra_info: {error}") from error


def _schema(extra_info: Iterable[pa.DataType]) -> pa.Schema:
    """Columns of the alignment file; extra_info: types of the rows', which get one that has the
    fields of all."""
    try:
        extra = pa.unify_schemas(
            [pa.schema([("extra_info", each)]) for each in extra_info],
            promote_options="permissive",
        )
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise ValueError(f"the rows' extra_info can't be written to one file: {error}") from error
    reward = [*dict(PROMPT_FIELDS)["reward_model"], EQUIVALENT_ANSWERS]
    others = [field for field in PROMPT_FIELDS if field[0] != "reward_model"]
    return pa.schema([*others, ("reward_model", pa.struct(reward)), *extra])


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
            "equivalent_answers": list(row.equivalents) if is_prompt else [],
        },
        # the row that it was made of takes the place of a number in a file that is no more
        "extra_info": {**(row.extra_info if is_prompt else {}), "index": row.row_id},
    }


def digests(item: dict[str, Any]) -> list[bytes]:
    """What must not be on both sides of the split: the row's images or, where it has none, its
    text."""
    if item["images"]:
        return [hashlib.sha256(image["bytes"]).digest() for image in item["images"]]
    turns = [hashlib.sha256(turn["content"].encode()).digest() for turn in item["prompt"]]
    return [b"".join(turns)]


def groups(contents: Iterable[list[bytes]]) -> list[bytes]:
    """The group that each row belongs to, given the digests of each: rows that share one belong
    together, and so do those that others connect. A group goes by the smallest of its digests,
    which does not depend on the order of the rows."""
    parent: dict[bytes, bytes] = {}

    def root(digest: bytes) -> bytes:
        while (above := parent.setdefault(digest, digest)) != digest:
            # halves the way for those that come after
            parent[digest] = digest = parent[above]
        return digest

    firsts = []
    for shown in contents:
        firsts.append(shown[0])
        roots = {root(digest) for digest in shown}
        for each in roots:
            parent[each] = min(roots)
    return [root(first) for first in firsts]


def drawn(group: bytes, seed: int, share: float) -> bool:
    """Whether a group of rows is held out."""
    digest = hashlib.sha256(str(seed).encode() + group).digest()
    return int.from_bytes(digest[:8]) < share * 2**64
