"""Prompts of middle difficulty, for RLVR: where the policy is always or never right, all responses
of a group have the same reward and nothing is learned.

prompts --> sampled by the policy (sampling.py) --> share of right answers --> in [low, high]?
                                                                                `--> parquet
Source: PRISM keeps pass rates of 0.2 to 0.8 over 16 responses; its script was not published.
"""

from __future__ import annotations

import json
from contextlib import closing
from typing import Any

import pyarrow as pa

from checkpoint_tools.files import write_atomically
from prism_megatron.config import load, schema
from prism_megatron.data.rows import (
    IMAGES,
    FileRows,
    PromptRow,
    prompt_writer,
    read_prompts,
    stored_images,
)
from prism_megatron.data.sources import Source, open_sources
from prism_megatron.data.stream import Quarantine
from prism_megatron.objectives.rewards.scorer import Scorer
from prism_megatron.pipelines.sampling import SampledRow, open_engines, sample
from prism_megatron.rollout.fleet import Fleet
from prism_megatron.rollout.rewards import reward_item


def run(config: schema.FilterDifficulty) -> None:
    """Write config.out, and run.dir/difficulty.json: how many prompts have which pass rate."""
    filter_prompts(config, open_engines(config))


def filter_prompts(config: schema.FilterDifficulty, engines: Fleet) -> None:
    """The same with engines that have the policy's weights."""
    quarantine = Quarantine(config.run.dir / "quarantine.jsonl", config.data.max_bad_share)
    sources = open_sources(config.data, read_prompts)
    with closing(Scorer(config.rewards)) as scorer:
        rates = [
            (sampled.source, sampled.index, pass_rate(sampled, scorer))
            for sampled in sample(config, sources, engines, quarantine)
        ]
    kept = [entry for entry in rates if config.low <= entry[2] <= config.high]
    result = {
        "rows": sum(map(len, sources)),
        "quarantined": quarantine.total,
        "kept": len(kept),
        "too_hard": sum(rate < config.low for _, _, rate in rates),
        "too_easy": sum(rate > config.high for _, _, rate in rates),
        "pass_rates": _histogram([rate for _, _, rate in rates]),
        **load.provenance(),
    }
    write_atomically(config.run.dir / "difficulty.json", json.dumps(result, indent=2) + "\n")
    print(
        f"{len(kept)} of {result['rows']} prompts have pass rates in [{config.low}, {config.high}];"
        f" {result['too_hard']} are below, {result['too_easy']} above; {quarantine.summary()}"
    )
    if not kept:
        raise ValueError(
            "no prompt is left; widen low and high, or sample with a policy of another strength: "
            f"{config.run.dir / 'difficulty.json'} has the pass rates"
        )
    with prompt_writer(config.out, _schema(kept)) as add:
        for source, index, rate in kept:
            images = stored_images(source[index].images)
            add(_stored(source, index) | {"images": images, "pass_rate": rate})


def pass_rate(sampled: SampledRow, scorer: Scorer) -> float:
    """Share of the responses that are finished and right."""
    rewards = scorer.score(
        [
            reward_item(sampled.row, response.read(scorer.config.rules), finished=response.finished)
            for response in sampled.responses
        ]
    )
    return sum(reward.accuracy for reward in rewards) / len(rewards)


def _histogram(rates: list[float]) -> dict[str, int]:
    return {f"{rate:g}": rates.count(rate) for rate in sorted(set(rates))}


def _stored(source: Source[PromptRow], index: int) -> dict[str, Any]:
    rows, place = source.place(index)
    return dict(rows.stored(place))


def _schema(kept: list[tuple[Source[PromptRow], int, float]]) -> pa.Schema:
    """Columns of the kept rows' files, the images as bytes, and pass_rate; ValueError if the files
    have columns of one name and different types."""
    by_file: dict[FileRows[PromptRow], list[int]] = {}
    for source, index, _ in kept:
        rows, place = source.place(index)
        by_file.setdefault(rows, []).append(place)
    schemas = [
        rows.schema or pa.Table.from_pylist([rows.stored(place) for place in places]).schema
        for rows, places in by_file.items()
    ]
    try:
        columns = pa.unify_schemas(schemas, promote_options="permissive")
    except pa.ArrowInvalid as error:
        raise ValueError(f"the sources can't be written to one file: {error}") from error
    fields = [field for field in columns if field.name not in ("images", "pass_rate")]
    return pa.schema([*fields, ("images", IMAGES), ("pass_rate", pa.float64())])
