"""What a data section holds: lengths, images and unusable rows of each source.

sources --encode as training would--> lengths a row --quantiles--> table, data_stats.json
                    `--> quarantine.jsonl                `--> data_stats.png
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import batched
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from checkpoint_tools.files import write_atomically
from prism_megatron import plots
from prism_megatron.config import load, schema
from prism_megatron.data.prompts import PromptEncoder
from prism_megatron.data.rows import (
    PAIR_SECTIONS,
    TEACHER_SECTIONS,
    PairRow,
    PromptRow,
    Row,
    RowError,
    SFTRow,
    read_pairs,
    read_prompts,
    read_sft,
)
from prism_megatron.data.sources import Source, open_sources
from prism_megatron.data.stream import Quarantine

READERS: dict[str, Any] = {"sft": read_sft, "prompts": read_prompts, "pairs": read_pairs}
QUANTILES = {"min": 0.0, "5 %": 0.05, "median": 0.5, "95 %": 0.95, "99 %": 0.99, "max": 1.0}
ROWS_AT_ONCE = 256

Columns = dict[str, list[int]]
"""Name of a count -> its value for each usable row that has it."""


def run(config: schema.DataStats) -> None:
    """Print a table, and write data_stats.json and data_stats.png into run.dir."""
    encoder = PromptEncoder.from_config(config.model, config.data)
    path = config.run.dir / "quarantine.jsonl"
    path.unlink(missing_ok=True)
    # every row is looked at, however many are bad
    quarantine = Quarantine(path, max_bad_share=1.0)
    sources: list[Source[Row]] = open_sources(config.data, READERS[config.rows])
    columns = {
        source.name: measure(source, encoder, quarantine, config.data.num_workers)
        for source in sources
    }
    result = {
        "model": str(config.model),
        "sources": {s.name: summary(s, columns[s.name], quarantine) for s in sources},
        **load.provenance(),
    }
    write_atomically(config.run.dir / "data_stats.json", json.dumps(result, indent=2) + "\n")
    write_atomically(config.run.dir / "data_stats.png", plots.lengths_png(columns))
    for name, found in result["sources"].items():
        Console().print(table(name, found))
    print(quarantine.summary())


def measure(
    source: Source[Row], encoder: PromptEncoder, quarantine: Quarantine, num_workers: int
) -> Columns:
    """The counts of every usable row; the others are quarantined."""

    def count(index: int) -> dict[str, int] | RowError:
        try:
            return counts(source[index], encoder)
        except RowError as error:
            return error

    columns: Columns = {}
    with ThreadPoolExecutor(max(1, num_workers)) as workers:
        # some at a time: rows that wait for a thread are memory
        chunks = batched(range(len(source)), ROWS_AT_ONCE)
        total = -(-len(source) // ROWS_AT_ONCE)
        for chunk in track(chunks, f"data-stats {source.name}", total):
            for index, found in zip(chunk, workers.map(count, chunk), strict=True):
                if isinstance(found, RowError):
                    quarantine.add(source, index, str(found))
                    continue
                for name, value in found.items():
                    columns.setdefault(name, []).append(value)
    return columns


def counts(row: Row, encoder: PromptEncoder) -> dict[str, int]:
    """Tokens of the prompt, of its images and of each text that is trained or judged; images; and
    whether a demonstration is cut off. RowError where training would quarantine the row."""
    prompt = encoder.encode_prompt(row)
    found = {
        "prompt_tokens": len(prompt.input_ids),
        "image_tokens": prompt.input_ids.count(encoder.image_token_id),
        "images": len(prompt.images),
    }
    if isinstance(row, SFTRow):
        ids = encoder.sft_sequence(prompt, row.response).input_ids
        found["response_tokens"] = len(ids) - len(prompt.input_ids)
        return found | {"truncated": int(ids[-1] != encoder.end_id)}
    names = PAIR_SECTIONS if isinstance(row, PairRow) else ()
    if isinstance(row, PromptRow):
        names = tuple(name for name in TEACHER_SECTIONS if getattr(row, name))
    texts = {f"{name}_tokens": encoder.encode_response(getattr(row, name)) for name in names}
    return found | {name: len(ids) for name, ids in texts.items()}


def summary(source: Source[Row], columns: Columns, quarantine: Quarantine) -> dict[str, Any]:
    """Rows, quarantined rows by reason, and of each count its mean and QUANTILES."""
    reasons = quarantine.counts.get(source.name, {})
    lengths = {name: values for name, values in columns.items() if name != "truncated"}
    result: dict[str, Any] = {
        "rows": len(source),
        "usable": len(columns.get("prompt_tokens", ())),
        "quarantined": dict(reasons),
        "counts": {name: quantiles(values) for name, values in lengths.items()},
    }
    if "truncated" in columns:
        result["truncated_share"] = float(np.mean(columns["truncated"]))
    return result


def quantiles(values: Sequence[int]) -> dict[str, float]:
    found = np.quantile(values, list(QUANTILES.values()), method="nearest").tolist()
    return {"mean": float(np.mean(values)), **dict(zip(QUANTILES, found, strict=True))}


def table(name: str, found: Mapping[str, Any]) -> Table:
    """One source's counts, a line each."""
    title = f"{name}: {found['usable']} of {found['rows']} rows usable"
    if "truncated_share" in found:
        title += f", {found['truncated_share']:.2%} cut off"
    lines = Table(
        title=title, caption="\n".join(f"{k}: {v}" for k, v in found["quarantined"].items())
    )
    for column in ("", "mean", *QUANTILES):
        lines.add_column(column, justify="right" if column else "left")
    for count, values in found["counts"].items():
        lines.add_row(count.replace("_", " "), *(f"{value:.6g}" for value in values.values()))
    return lines
