"""What a data section names, wherever it is, as sources of rows.

data.path or data.sources[i].path
    file, PATTERN                         files of this machine
    DIR/dataset_info.json:ENTRY           an entry of LLaMA-Factory's list of data sets
    owner/name, owner/name:FILE           a data set of the Hugging Face hub, or some of its files
--> files --read--> rows, one file after the other --> Source
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatch
from glob import glob
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

from prism_megatron.config import schema
from prism_megatron.data.rows import (
    FileOptions,
    FileRows,
    Message,
    Read,
    Row,
    read_system_prompt,
)

DATASET_INFO = "dataset_info.json"
DATA_SUFFIXES = (".parquet", ".jsonl", ".json")


class Source[R: Row]:
    """The rows of one source: those of its files one after the other, or a sample of them.

    name: what its counters and statistics go by, and its rows, as NAME:INDEX; weight: see
    BatchStream. num_samples: at most so many rows, the same ones in every run. system_prompt: for
    rows that bring none.
    """

    def __init__(
        self,
        name: str,
        files: Sequence[FileRows[R]],
        *,
        weight: float = 1.0,
        num_samples: int | None = None,
        system_prompt: str | None = None,
    ):
        self.name, self.weight, self.files = name, weight, files
        self._system_prompt = system_prompt
        self._starts = [0, *accumulate(map(len, files))]
        self._chosen = None
        if num_samples is not None and num_samples < self._starts[-1]:
            order = np.random.default_rng(0).permutation(self._starts[-1])
            self._chosen = np.sort(order[:num_samples])

    def __len__(self) -> int:
        return self._starts[-1] if self._chosen is None else len(self._chosen)

    def place(self, index: int) -> tuple[FileRows[R], int]:
        """The file that holds row `index`, and which of its rows it is."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {self.name}, which has {len(self)} rows")
        index = index if self._chosen is None else int(self._chosen[index])
        number = bisect_right(self._starts, index) - 1
        return self.files[number], index - self._starts[number]

    def row_id(self, index: int) -> str:
        """Name of a row, also of one that can't be read; no other row has it, whatever its files
        are called."""
        return f"{self.name}:{index if self._chosen is None else self._chosen[index]}"

    def __getitem__(self, index: int) -> R:
        rows, place = self.place(index)
        row = replace(rows[place], row_id=self.row_id(index))
        if self._system_prompt is not None and row.messages[0].role != "system":
            system = Message("system", self._system_prompt)
            return replace(row, messages=(system, *row.messages))
        return row


def open_sources[R: Row](data: schema.Data, read: Read[R]) -> list[Source[R]]:
    """The sources of a data section; ValueError or FileNotFoundError if one can't be had."""
    if data.path is not None:
        sections: Sequence[schema.Source] = [schema.Source(path=data.path)]
    else:
        sections = data.sources
    sources = [open_source(section, read, data.cache_dir) for section in sections]
    names = [source.name for source in sources]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"several of data.sources are called {twice}; give each a name of its own")
    return sources


def find_row[R: Row](sources: Sequence[Source[R]], name: str) -> R:
    """The row of that name; ValueError if no source has it."""
    for source in sources:
        if name.rpartition(":")[0] == source.name:
            for index in range(len(source)):
                if source.row_id(index) == name:
                    return source[index]
    raise ValueError(
        f"no row is called {name}, which a checkpoint carries along; give it the same data, or "
        "start a new run.dir from the exported model"
    )


def open_source[R: Row](
    section: schema.Source, read: Read[R], cache_dir: Path | None = None
) -> Source[R]:
    """One source, opened."""
    place = locate(section.path)
    options = FileOptions(cache_dir, section.media_dir, place.mapping)
    prompt = section.system_prompt
    return Source(
        section.name or place.name,
        [read(file, options) for file in place.files],
        weight=section.weight,
        num_samples=section.num_samples or place.num_samples,
        system_prompt=read_system_prompt(prompt),
    )


@dataclass(frozen=True)
class Place:
    """Files of one source, and what LLaMA-Factory's list says of them."""

    name: str
    files: list[Path]
    mapping: Mapping | None = None
    num_samples: int | None = None


def locate(path: Path) -> Place:
    """Where the data is that `path` names, downloaded from the hub unless it was before."""
    text = str(path)
    if path.is_file() and path.name != DATASET_INFO:
        return Place(path.stem, [path])
    before, _, part = text.partition(":")
    if before.endswith(DATASET_INFO):
        return _entry(Path(before), part)
    if any(character in before for character in "*?["):
        files = sorted(map(Path, glob(text)))
        if not files:
            raise FileNotFoundError(f"no file is named {path}")
        return Place(text, files)
    if path.is_dir():
        raise ValueError(
            f"{path} is a folder; name its files: {path}/*.parquet, or {path}/{DATASET_INFO}:ENTRY"
        )
    looks_local = before.startswith((".", "/", "~")) or before.endswith(DATA_SUFFIXES)
    if before.count("/") == 1 and not looks_local:
        return _from_hub(before, part)
    raise FileNotFoundError(f"data file {path} does not exist")


def _from_hub(repository: str, pattern: str) -> Place:
    """The files of a data set of the hub: those that `pattern` names, or all where it has but one
    file of rows; then images beside it come with it."""
    try:
        folder = Path(
            snapshot_download(repository, repo_type="dataset", allow_patterns=pattern or None)
        )
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, OSError) as error:
        raise ValueError(
            f"{repository} is neither a file here nor a data set that could be downloaded: {error}"
        ) from error
    names = [str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()]
    found = sorted(
        name
        for name in names
        if name.endswith(DATA_SUFFIXES) and fnmatch(name, pattern or "*")
        if not name.endswith((DATASET_INFO, "dataset_infos.json"))
    )
    if not found:
        raise ValueError(f"data set {repository} has no file {pattern or 'of rows'}")
    if not pattern and len(found) > 1:
        raise ValueError(
            f"data set {repository} has {len(found)} files: {', '.join(found[:8])}; say which, as "
            f"{repository}:{found[0]}, or give a pattern"
        )
    return Place(repository + (f":{pattern}" if pattern else ""), [folder / name for name in found])


def _entry(path: Path, name: str) -> Place:
    """An entry of a dataset_info.json: its files and how their columns are called."""
    try:
        entries = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not name and len(entries) == 1:
        (name,) = entries
    if name not in entries:
        raise ValueError(
            f"{path} has no entry {name!r}; name one as {path}:ENTRY of {', '.join(entries)}"
        )
    entry = entries[name]
    if entry.get("ranking"):
        raise ValueError(f"{path}: {name} is a ranking set, which SFT can't use")
    if "hf_hub_url" in entry:
        if entry.get("subset") or entry.get("split", "train") != "train":
            raise ValueError(
                f"{path}: {name} asks for a subset or split, which are names inside a data set's "
                f"card; name the files instead, as {entry['hf_hub_url']}:PATTERN"
            )
        folder = entry.get("folder")
        pattern = f"{folder}/*" if folder else ""
        files = _from_hub(entry["hf_hub_url"], pattern).files
    elif "file_name" in entry:
        place = path.parent / entry["file_name"]
        files = sorted(f for f in place.iterdir() if f.is_file()) if place.is_dir() else [place]
    else:
        raise ValueError(f"{path}: {name} has neither file_name nor hf_hub_url, but {list(entry)}")
    return Place(name, files, Mapping.of(entry), entry.get("num_samples"))


@dataclass(frozen=True)
class Mapping:
    """Names of LLaMA-Factory's columns and tags, with its defaults (its data/parser.py); makes a
    row of messages (role, content), images and system."""

    formatting: str = "alpaca"
    messages: str = "conversations"
    images: str = "images"
    system: str = "system"
    prompt: str = "instruction"
    query: str = "input"
    response: str = "output"
    history: str = "history"
    role_tag: str = "from"
    content_tag: str = "value"
    user_tag: str = "human"
    assistant_tag: str = "gpt"
    system_tag: str = "system"

    @classmethod
    def of(cls, entry: dict[str, Any]) -> Mapping:
        """That of an entry of dataset_info.json."""
        formatting = entry.get("formatting", "alpaca")
        if formatting not in ("alpaca", "sharegpt"):
            raise ValueError(f"formatting {formatting!r} is neither alpaca nor sharegpt")
        known = {field.name for field in fields(cls)}
        given = entry.get("columns", {}) | entry.get("tags", {})
        return cls(formatting, **{name: given[name] for name in known & given.keys()})

    def __call__(self, item: Any) -> Any:
        if not isinstance(item, dict):
            return item
        turns = self._alpaca(item) if self.formatting == "alpaca" else self._sharegpt(item)
        images, system = item.get(self.images), item.get(self.system)
        return {"messages": turns, "images": images, "system": system}

    def _sharegpt(self, item: dict[str, Any]) -> Any:
        roles = {
            self.user_tag: "user",
            self.assistant_tag: "assistant",
            self.system_tag: "system",
        }
        turns = item.get(self.messages)
        if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
            return turns
        tags = [(turn.get(self.role_tag), turn.get(self.content_tag)) for turn in turns]
        return [{"role": roles.get(str(role), role), "content": text} for role, text in tags]

    def _alpaca(self, item: dict[str, Any]) -> list[dict[str, Any]]:
        question = [item.get(name) for name in (self.prompt, self.query)]
        asked = "\n".join(text for text in question if text)
        pairs = [*(item.get(self.history) or ()), [asked, item.get(self.response)]]
        if not all(isinstance(pair, list) for pair in pairs):
            raise ValueError(f"{self.history!r} is a list of [question, answer], not {pairs[:-1]}")
        roles = ("user", "assistant")
        return [
            {"role": role, "content": text}
            for pair in pairs
            for role, text in zip(roles, pair, strict=True)
        ]
