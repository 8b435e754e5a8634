"""Readers of the published data formats, and what happens to rows that can't be used.

Three formats, three readers: `read_sft` (sharegpt multimodal JSON), `read_prompts` (parquet of the
alignment and RLVR stages), `read_pairs` (JSONL of the discriminator warm-up). Each gives `Rows`: a
length and random access by index. A file that is empty or of another format is a ValueError at
once; a single bad row raises RowError when it is read, and `Quarantine` records it.

Images stay encoded bytes or a path until a row is turned into tokens.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from checkpoint_tools.files import write_atomically

CACHED_ROW_GROUPS = 4
ROLES = {"human": "user", "gpt": "assistant"}
PAIR_SECTIONS = ("teacher_caption", "student_caption", "teacher_cot", "student_cot")


class RowError(ValueError):
    """One row can't be used; the message is the reason that the quarantine records.

    Written as "kind: detail"; the quarantine counts rows by kind.
    """


@dataclass(frozen=True)
class Message:
    """One turn; every literal <image> in the content stands for the next image of the row."""

    role: str
    content: str


@dataclass(frozen=True)
class ImageSource:
    """An image that is not decoded yet: its encoded bytes, or the file that holds them."""

    data: bytes | None = None
    path: Path | None = None

    def read(self) -> bytes:
        """The encoded bytes; RowError if the file can't be read."""
        if self.data is not None:
            return self.data
        assert self.path is not None
        try:
            return self.path.read_bytes()
        except OSError as error:
            raise RowError(f"missing image: {self.path} ({error.strerror})") from error


@dataclass(frozen=True)
class Row:
    """What every format has: the turns before the response, and their images in order."""

    row_id: str
    messages: tuple[Message, ...]
    images: tuple[ImageSource, ...]

    @property
    def question(self) -> str:
        """Text of the last user turn."""
        return next(turn.content for turn in reversed(self.messages) if turn.role == "user")


@dataclass(frozen=True)
class SFTRow(Row):
    """A conversation whose last turn is the demonstration to learn."""

    response: str


@dataclass(frozen=True)
class PromptRow(Row):
    """A prompt to sample responses for, with what they are judged by.

    The teacher's sections include their tags; they are None where the file does not have them.
    """

    ground_truth: str
    data_source: str
    equivalents: tuple[str, ...] = ()
    teacher_response: str | None = None
    teacher_caption: str | None = None
    teacher_cot: str | None = None
    extra_info: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PairRow(Row):
    """A prompt with the teacher's and a student's sections, tags included."""

    teacher_caption: str
    student_caption: str
    teacher_cot: str
    student_cot: str


class Rows[R](Protocol):
    """A data file: `rows[i]` parses row i and raises RowError if it can't be used."""

    source: Path

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> R: ...

    def row_id(self, index: int) -> str:
        """Name of a row, also of one that can't be read."""
        ...


class JSONRows[R]:
    """Rows of a JSON file, kept as read and parsed one by one."""

    def __init__(self, source: Path, items: list[Any], parse: Callable[[Any, str, Path], R]):
        self.source = source
        self._items = items
        self._parse = parse

    def __len__(self) -> int:
        return len(self._items)

    def row_id(self, index: int) -> str:
        return f"{self.source.stem}:{index}"

    def __getitem__(self, index: int) -> R:
        return self._parse(self._items[index], self.row_id(index), self.source.parent)


class ParquetRows:
    """Rows of a parquet file; only the last few row groups that were touched are in memory."""

    def __init__(self, source: Path, file: pq.ParquetFile, required: tuple[str, ...]):
        self.source = source
        self._required = required
        groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        self._starts = np.cumsum([0, *groups])
        self._group = lru_cache(CACHED_ROW_GROUPS)(file.read_row_group)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def row_id(self, index: int) -> str:
        return f"{self.source.stem}:{index}"

    def __getitem__(self, index: int) -> PromptRow:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {self.source}, which has {len(self)} rows")
        group = int(np.searchsorted(self._starts, index, side="right")) - 1
        table: pa.Table = self._group(group)
        item = table.slice(index - int(self._starts[group]), 1).to_pylist()[0]
        return _prompt_row(item, self.row_id(index), self.source.parent, self._required)


def read_sft(path: Path) -> JSONRows[SFTRow]:
    """Rows of a sharegpt multimodal JSON file.

    A row has `messages` (role, content) or `conversations` (from, value), and optionally `images`
    (paths, absolute or relative to the file) and `system`; its last turn is the assistant's.
    """
    try:
        items = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}; sharegpt data is one JSON list") from error
    if not isinstance(items, list):
        raise ValueError(f"{path} holds a {type(items).__name__}; sharegpt data is one JSON list")
    _check_keys(path, items, (("messages", "conversations"),))
    return JSONRows(path, items, _sft_row)


def read_pairs(path: Path) -> JSONRows[PairRow]:
    """Rows of a warm-up JSONL file.

    A line has `prompt` (or `question`), the four sections `teacher_caption`, `student_caption`,
    `teacher_cot`, `student_cot`, and optionally `image` (a path). A prompt without a literal
    <image> gets one in front when the line has an image.
    """
    lines: list[Any] = [line for line in path.read_text().split("\n") if line.strip()]
    parsed = [_json_or_none(line) for line in lines[:100]]
    _check_keys(path, parsed, (("prompt", "question"), *((key,) for key in PAIR_SECTIONS)))
    return JSONRows(path, lines, _pair_row)


def read_prompts(path: Path, required: tuple[str, ...] = ()) -> ParquetRows:
    """Rows of an alignment or RLVR parquet file.

    Columns: `prompt` (list of role and content), `images` (list of bytes, of {bytes, path}, or of
    paths), `reward_model` {ground_truth}, and optionally `data_source`, `extra_info`,
    `teacher_response`, `teacher_caption`, `teacher_cot`. `required` names more columns that the
    file must have and that no row may leave empty: alignment needs the teacher's two sections.
    """
    try:
        file = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is not a parquet file: {error}") from error
    if file.metadata.num_rows == 0:
        raise ValueError(f"{path} has no rows")
    wanted = ("prompt", "reward_model", *required)
    missing = [name for name in wanted if name not in file.schema_arrow.names]
    if missing:
        raise ValueError(
            f"{path} lacks the columns {missing}; it has {file.schema_arrow.names}, "
            f"wanted are {list(wanted)}"
        )
    return ParquetRows(path, file, wanted)


def write_pairs(path: Path, rows: Iterable[PairRow]) -> int:
    """Write warm-up pairs as JSONL that `read_pairs` gives back, and return how many.

    Images given as bytes are written once each to `<stem>_images/` beside the file. A row may have
    one image at most, and its prompt is its last user turn: the format has no more room.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for row in rows:
        line = {"id": row.row_id, "prompt": row.question}
        if row.images:
            line["image"] = _store_image(row, path)
        lines.append(json.dumps(line | {key: getattr(row, key) for key in PAIR_SECTIONS}) + "\n")
    write_atomically(path, "".join(lines))
    return len(lines)


def _store_image(row: PairRow, path: Path) -> str:
    """Path to write for the row's image, relative to the JSONL where the image is stored there."""
    if len(row.images) > 1:
        raise ValueError(f"{row.row_id} has {len(row.images)} images; a warm-up pair holds one")
    (image,) = row.images
    if image.path is not None:
        return str(image.path.resolve())
    data = image.read()
    name = f"{path.stem}_images/{hashlib.sha256(data).hexdigest()[:24]}"
    target = path.parent / name
    if not target.exists():
        target.parent.mkdir(exist_ok=True)
        write_atomically(target, data)
    return name


def _check_keys(path: Path, items: list[Any], wanted: tuple[tuple[str, ...], ...]) -> None:
    """Fail unless some row has all the wanted keys (each a tuple of names that will do)."""
    if not items:
        raise ValueError(f"{path} has no rows")
    found = [list(item) for item in items if isinstance(item, dict)]
    if not any(all(set(names) & set(keys) for names in wanted) for keys in found):
        names = [" or ".join(names) for names in wanted]
        raise ValueError(f"no row of {path} has the keys {names}; the first has {found[:1]}")


def _json_or_none(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


def _text(item: Mapping[str, Any], *names: str) -> str:
    """The first of the named values that is there; RowError if none is a non-empty string."""
    value = next((item[name] for name in names if item.get(name)), None)
    if not isinstance(value, str):
        raise RowError(f"missing required column {' or '.join(map(repr, names))}")
    return value


def _messages(turns: Any, column: str) -> tuple[Message, ...]:
    if not isinstance(turns, list) or not turns:
        raise RowError(f"missing required column {column!r}")
    messages = []
    for turn in turns:
        if not isinstance(turn, dict):
            raise RowError(f"malformed {column!r}: a turn is an object, not {turn}")
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if not isinstance(role, str) or not isinstance(content, str):
            raise RowError(f"malformed {column!r}: a turn needs a role and a text, not {turn}")
        messages.append(Message(ROLES.get(role, role), content))
    return tuple(messages)


def _images(values: Any, folder: Path) -> tuple[ImageSource, ...]:
    return tuple(_image(value, folder) for value in values or ())


def _image(value: Any, folder: Path) -> ImageSource:
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("image") or value.get("path")
    if isinstance(value, bytes):
        return ImageSource(data=value)
    if not isinstance(value, str):
        raise RowError(f"malformed image: bytes or a path is wanted, not {type(value).__name__}")
    if "://" in value:
        raise RowError(f"remote image: {value}; download it and give its path")
    return ImageSource(path=folder / value)


def _sft_row(item: Any, row_id: str, folder: Path) -> SFTRow:
    if not isinstance(item, dict):
        raise RowError(f"malformed row: a JSON object is wanted, not a {type(item).__name__}")
    column = "messages" if "messages" in item else "conversations"
    *prompt, last = _messages(item.get(column), column)
    if last.role != "assistant" or not last.content or not prompt:
        raise RowError(f"malformed {column!r}: it must end with an assistant turn after others")
    if item.get("system"):
        prompt.insert(0, Message("system", item["system"]))
    images = _images(item.get("images"), folder)
    return SFTRow(row_id, tuple(prompt), images, response=last.content)


def _pair_row(line: str, row_id: str, folder: Path) -> PairRow:
    item = _json_or_none(line)
    if not isinstance(item, dict):
        raise RowError("malformed row: the line is not a JSON object")
    text = _text(item, "prompt", "question")
    images = _images([item["image"]] if item.get("image") else [], folder)
    if images and "<image>" not in text:
        text = f"<image>\n{text}"
    sections = {key: _text(item, key) for key in PAIR_SECTIONS}
    return PairRow(str(item.get("id", row_id)), (Message("user", text),), images, **sections)


def _prompt_row(
    item: dict[str, Any], row_id: str, folder: Path, required: tuple[str, ...]
) -> PromptRow:
    for column in required:
        if not item.get(column):
            raise RowError(f"missing required column {column!r}")
    if item.get("videos"):
        raise RowError("video: only images are supported")
    reward, extra = item["reward_model"], item.get("extra_info") or {}
    truth = reward.get("ground_truth") if isinstance(reward, dict) else None
    if truth is None or truth == "":
        raise RowError("missing required column 'reward_model.ground_truth'")
    messages = _messages(item["prompt"], "prompt")
    if messages[-1].role != "user":
        raise RowError(
            f"malformed 'prompt': it must end with a user turn, not {messages[-1].role}'s"
        )
    return PromptRow(
        row_id=row_id,
        messages=messages,
        images=_images(item.get("images"), folder),
        ground_truth=str(truth),
        data_source=item.get("data_source") or "",
        equivalents=tuple(map(str, reward.get("equivalent_answers") or ())),
        teacher_response=item.get("teacher_response"),
        teacher_caption=item.get("teacher_caption"),
        teacher_cot=item.get("teacher_cot"),
        extra_info=extra,
    )


class Quarantine:
    """Rows that can't be used: each written once with its reason, counted, and limited in share.

    path: JSON lines {row, source, reason}; a run that goes on keeps what is already there.
    write: False on all ranks but one, which then count alike without writing.
    """

    def __init__(self, path: Path, max_bad_share: float, *, write: bool = True):
        self.path = path
        self._write = write
        self.max_bad_share = max_bad_share
        self.counts: Counter[str] = Counter()
        self._seen: set[tuple[str, str]] = set()
        if path.exists():
            for line in path.read_text().splitlines():
                entry = json.loads(line)
                self._count(entry["row"], entry["source"], entry["reason"])

    @property
    def total(self) -> int:
        """Distinct rows quarantined."""
        return len(self._seen)

    def add(self, row_id: str, source: Path, reason: str) -> None:
        """Record a row; one that is already recorded is not counted again."""
        if not self._count(row_id, str(source), reason) or not self._write:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        entry = json.dumps({"row": row_id, "source": str(source), "reason": reason})
        # One write to a file opened for appending: a killed run leaves whole lines.
        handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(handle, f"{entry}\n".encode())
        finally:
            os.close(handle)

    def check(self, num_rows: int) -> None:
        """ValueError if more than the allowed share of a file's `num_rows` rows is bad."""
        if self.total > self.max_bad_share * num_rows:
            raise ValueError(
                f"{self.total} of {num_rows} rows can't be used, more than "
                f"data.max_bad_share={self.max_bad_share:g} allows: {self._reasons()}; "
                f"see {self.path}"
            )

    def summary(self) -> str:
        """One line for the end of a run."""
        if not self.total:
            return "0 rows quarantined"
        return f"{self.total} rows quarantined ({self._reasons()}), listed in {self.path}"

    def _count(self, row_id: str, source: str, reason: str) -> bool:
        if (source, row_id) in self._seen:
            return False
        self._seen.add((source, row_id))
        # Up to the first colon a reason is its kind; after it stand the row's own numbers.
        self.counts[reason.split(":")[0]] += 1
        return True

    def _reasons(self) -> str:
        return ", ".join(f"{reason}: {count}" for reason, count in self.counts.most_common())


def convert_all[R, T](rows: Rows[R], convert: Callable[[R], T], quarantine: Quarantine) -> list[T]:
    """Every usable row of a file, converted, in file order."""
    converted = []
    for index in range(len(rows)):
        try:
            converted.append(convert(rows[index]))
        except RowError as error:
            quarantine.add(rows.row_id(index), rows.source, str(error))
            quarantine.check(len(rows))
    return converted


class BatchStream[R, T]:
    """Endless batches of converted rows, reshuffled every epoch.

    A row that can't be read or converted is quarantined and the next one takes its place, so every
    batch is full. The order follows from the seed, and `position` (rows drawn so far) is all the
    state there is: a run that saves and restores it goes on with the batch it would have had.
    """

    def __init__(
        self,
        rows: Rows[R],
        convert: Callable[[R], T],
        quarantine: Quarantine,
        *,
        batch_size: int,
        seed: int,
    ):
        self.position = 0
        self._rows = rows
        self._convert = convert
        self._quarantine = quarantine
        self._batch_size = batch_size
        self._order = lru_cache(1)(
            lambda epoch: np.random.default_rng((seed, epoch)).permutation(len(rows))
        )

    def next_batch(self) -> list[T]:
        """The next `batch_size` usable rows; ValueError when too many rows can't be used."""
        batch: list[T] = []
        failures = 0
        while len(batch) < self._batch_size:
            epoch, offset = divmod(self.position, len(self._rows))
            index = int(self._order(epoch)[offset])
            self.position += 1
            try:
                batch.append(self._convert(self._rows[index]))
                failures = 0
            except RowError as error:
                failures += 1
                self._quarantine.add(self._rows.row_id(index), self._rows.source, str(error))
                self._quarantine.check(len(self._rows))
            if failures > 2 * len(self._rows):
                raise ValueError(f"no row of {self._rows.source} can be used")
        return batch
