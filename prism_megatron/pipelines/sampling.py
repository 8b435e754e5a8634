"""A policy's responses to every prompt of a data section, sampled once.

rows --encode--> prompts --engines, sampling.n each--> responses.jsonl, a line a prompt
        ^ the next batch's, while engines sample          `--> SampledRow, in the rows' order

Engines read the policy's Hugging Face directory themselves, so that no trainer holds it. A response
is written down as soon as all of its prompt are there; a run that is started again samples only
what responses.jsonl lacks.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import batched
from pathlib import Path
from typing import Any

from checkpoint_tools.files import identity
from checkpoint_tools.headers import hf_directory
from checkpoint_tools.hf_directory import SafetensorsDirectory
from prism_megatron.config import schema
from prism_megatron.data.files import JSONItems, scan_lines
from prism_megatron.data.prompts import PromptEncoder
from prism_megatron.data.rows import PromptRow, RowError
from prism_megatron.data.sources import Source
from prism_megatron.data.stream import Quarantine, append_line, drop_half_line
from prism_megatron.rollout import fleet
from prism_megatron.training.display import Display
from prism_megatron.training.setup import start
from prism_megatron.types import Prompt, Rollout

ROUNDS = 16
"""Prompts of a batch, in relation to those that the engines take at once. The last ones of a batch
leave engines idle, the fewer batches the less; a batch's images are in memory."""


@dataclass(frozen=True)
class Response:
    """A sampled text, and whether the policy ended it; without_control: the text without control
    tokens, where it has some."""

    text: str
    finished: bool
    without_control: str | None = None

    def read(self, way: schema.Defect) -> str:
        """The text as PromptEncoder.decode gives it."""
        if way == "reference" and self.without_control is not None:
            return self.without_control
        return self.text


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

    @property
    def key(self) -> tuple[str, int]:
        return self.source.name, self.index


def open_engines(config: schema.PolicySampling) -> fleet.Fleet:
    """config.rollout's engines with the weights of config.model.

    ValueError if that is no Hugging Face directory, or there is more than one process.
    """
    if (world := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise ValueError(
            f"one process asks the engines, but {world} were started; start one "
            "(NPROC_PER_NODE=1 with launch/), and set rollout.engines for more to sample at once"
        )
    path = config.model.resolve()
    if hf_directory(path) != path:
        raise ValueError(
            f"model={config.model} is a Megatron checkpoint, but engines read Hugging Face "
            "directories; export it, and give the result: prism-megatron checkpoint megatron-to-hf "
            f"--ckpt {config.model} --out {config.model}-hf"
        )
    # before engines that take minutes to start: all files are there
    SafetensorsDirectory(path)
    backend = start(config)
    engines = fleet.build(
        config.rollout,
        None,
        path,
        seed=config.run.seed,
        logs=config.run.dir / "engines",
        device=backend.device,
    )
    if engines.weight_version < 0:
        engines.sync(0)
    return engines


def sample(
    config: schema.PolicySampling,
    sources: list[Source[PromptRow]],
    engines: fleet.Fleet,
    quarantine: Quarantine,
    check: Callable[[PromptRow], object] = lambda row: None,
) -> Iterator[SampledRow]:
    """Every usable row of the sources with config.sampling.n responses.

    check: raises RowError for rows that the caller has no use for. ValueError if run.dir holds
    responses to other prompts, or of another policy.
    """
    encoder = PromptEncoder.from_config(config.model, config.data)
    journal = _Journal(config.run.dir / "responses.jsonl", _job(config, sources))
    total = sum(map(len, sources))

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
                    display.advance()

    def keep(task: _Task, rollouts: list[Rollout]) -> None:
        journal.add(task.key, [response(rollout) for rollout in rollouts])
        display.advance()

    def response(rollout: Rollout) -> Response:
        text, plain = encoder.decode(rollout.ids), encoder.decode(rollout.ids, "reference")
        finished = rollout.finish_reason == "stop"
        return Response(text, finished, None if text == plain else plain)

    def submit(missing: list[_Task]) -> None:
        prompts = [task.prompt for task in missing if task.prompt is not None]
        # one step for all, so that a prompt's random numbers do not depend on its batch
        engines.submit(
            prompts, config.sampling, 0, answered=lambda i, rollouts: keep(missing[i], rollouts)
        )

    def rows(chunk: tuple[_Task, ...]) -> Iterator[SampledRow]:
        for task in chunk:
            yield SampledRow(task.source, task.index, task.row, journal.take(task.key))

    with Display(config.run.dir.name, "prompt", total, len(journal)) as display:
        out: tuple[_Task, ...] = ()
        is_out = False
        for chunk in batched(tasks(), _batch_size(config)):
            if is_out:
                engines.collect(engines.weight_version)
            if is_out := bool(missing := [task for task in chunk if task.prompt is not None]):
                engines.readmit()
                submit(missing)
            yield from rows(out)
            out = chunk
        if is_out:
            engines.collect(engines.weight_version)
        yield from rows(out)


def _batch_size(config: schema.PolicySampling) -> int:
    """Rows whose prompts are submitted together."""
    sampling, rollout = config.sampling, config.rollout
    if rollout.kind == "embedded":
        # as many as it decodes at once, so that a stopped run loses no more than these
        return max(1, sampling.batch_size // sampling.n)
    longest = config.data.max_prompt_tokens + sampling.n * sampling.max_new_tokens
    at_once = max(1, rollout.max_outstanding_tokens // longest)
    return ROUNDS * rollout.engines * at_once


def _job(config: schema.PolicySampling, sources: list[Source[PromptRow]]) -> dict[str, Any]:
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
        self._added: dict[tuple[str, int], list[Response]] = {}

    def __len__(self) -> int:
        """Rows with responses when the file was opened."""
        return len(self._places)

    def __contains__(self, key: tuple[str, int]) -> bool:
        """Whether they were there when the file was opened."""
        return key in self._places

    def take(self, key: tuple[str, int]) -> list[Response]:
        """A row's responses; to be asked for once."""
        if key in self._added:
            return self._added.pop(key)
        return [Response(**response) for response in self._stored[self._places[key]]["responses"]]

    def add(self, key: tuple[str, int], responses: list[Response]) -> None:
        source, row = key
        stored = [asdict(response) for response in responses]
        append_line(self._path, {"source": source, "row": row, "responses": stored})
        self._added[key] = responses
