"""A policy's responses to every prompt of a data section, sampled once.

rows --encode--> prompts --engine, sampling.n each--> responses.jsonl, a line a prompt
                                                           `--> SampledRow, in the rows' order

A run that is started again samples only what responses.jsonl lacks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import batched
from pathlib import Path
from typing import Any

from rich.progress import track

from checkpoint_tools.files import identity
from prism_megatron.config import schema
from prism_megatron.data.files import JSONItems, scan_lines
from prism_megatron.data.prompts import PromptEncoder
from prism_megatron.data.rows import PromptRow, RowError
from prism_megatron.data.sources import Source
from prism_megatron.data.stream import Quarantine, append_line, drop_half_line
from prism_megatron.objectives.sections import response_text, token_bytes
from prism_megatron.rollout.engine import RolloutEngine
from prism_megatron.types import Prompt


@dataclass(frozen=True)
class Response:
    """A sampled text, and whether the policy ended it."""

    text: str
    finished: bool


@dataclass(frozen=True)
class SampledRow:
    """A row, where it is, and its responses."""

    source: Source[PromptRow]
    index: int
    row: PromptRow
    responses: list[Response]


@dataclass(frozen=True)
class _Task:
    """A usable row; prompt: None where its responses are there already."""

    source: Source[PromptRow]
    index: int
    row: PromptRow
    prompt: Prompt | None


def sample(
    config: schema.MakeWarmupPairs | schema.FilterDifficulty,
    sources: list[Source[PromptRow]],
    engine: RolloutEngine,
    quarantine: Quarantine,
    check: Callable[[PromptRow], object] = lambda row: None,
) -> Iterator[SampledRow]:
    """Every usable row of the sources with config.sampling.n responses.

    check: raises RowError for rows that the caller has no use for. ValueError if run.dir holds
    responses to other prompts, or of another policy.
    """
    encoder = PromptEncoder.from_config(config.model, config.data)
    table = token_bytes(encoder.tokenizer)
    journal = _Journal(config.run.dir / "responses.jsonl", _job(config, sources))

    def tasks() -> Iterator[_Task]:
        for source in sources:
            for index in range(len(source)):
                try:
                    row = source[index]
                    check(row)
                    done = (source.name, index) in journal
                    yield _Task(source, index, row, None if done else encoder.encode_prompt(row))
                except RowError as error:
                    quarantine.add(source, index, str(error))

    # as many prompts as the engine decodes at once, so that a stopped run loses no more than these
    size = max(1, config.sampling.batch_size // config.sampling.n)
    progress = track(tasks(), config.run.dir.name, sum(map(len, sources)))
    for number, chunk in enumerate(batched(progress, size)):
        missing = [task for task in chunk if task.prompt is not None]
        prompts = [task.prompt for task in missing if task.prompt is not None]
        rollouts = engine.generate(prompts, config.sampling, number * size) if prompts else []
        fresh = {}
        for task, group in zip(missing, rollouts, strict=True):
            texts = [response_text(rollout.ids, table, (encoder.end_id,)) for rollout in group]
            fresh[task.source.name, task.index] = [
                Response(text, rollout.finish_reason == "stop")
                for text, rollout in zip(texts, group, strict=True)
            ]
        for key, responses in fresh.items():
            journal.add(key, responses)
        for task in chunk:
            key = task.source.name, task.index
            yield SampledRow(task.source, task.index, task.row, fresh.get(key) or journal[key])


def _job(
    config: schema.MakeWarmupPairs | schema.FilterDifficulty, sources: list[Source[PromptRow]]
) -> dict[str, Any]:
    """What the responses depend on: another one's are not gone on with."""
    files = [rows.path for source in sources for rows in source.files]
    prompts = [config.data.system_prompt, *(source.system_prompt for source in config.data.sources)]
    files += [path for path in prompts if path is not None]
    return {
        "model": identity(config.model.resolve()),
        "data": [identity(file.resolve()) for file in files],
        "prompts": config.data.model_dump(
            mode="json", exclude={"max_bad_share", "num_workers", "cache_dir"}
        ),
        "sampling": config.sampling.model_dump(mode="json", exclude={"batch_size"}),
        "seed": config.run.seed,
    }


class _Journal:
    """Responses by source and row in a file that only grows: the job, then a line a prompt.

    A killed run leaves whole lines, but for the last one on a disk that was full.
    """

    def __init__(self, path: Path, job: dict[str, Any]) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            drop_half_line(path)
        if not path.exists() or not path.stat().st_size:
            append_line(path, {"job": job})
        stored = JSONItems(path, scan_lines(path))
        if stored[0]["job"] != json.loads(json.dumps(job)):
            raise ValueError(
                f"{path} holds responses of another model, other data or other settings; choose "
                "another run.dir, or remove the file"
            )
        entries = ((i, stored[i]) for i in range(1, len(stored)))
        self._places = {(entry["source"], entry["row"]): i for i, entry in entries}

        self._stored = stored

    def __contains__(self, key: tuple[str, int]) -> bool:
        return key in self._places

    def __getitem__(self, key: tuple[str, int]) -> list[Response]:
        """Responses that were there when the file was opened."""
        return [Response(**response) for response in self._stored[self._places[key]]["responses"]]

    def add(self, key: tuple[str, int], responses: list[Response]) -> None:
        source, row = key
        stored = [asdict(response) for response in responses]
        append_line(self._path, {"source": source, "row": row, "responses": stored})
