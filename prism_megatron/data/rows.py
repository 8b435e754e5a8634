"""Rows of the published data: what they hold, how they are read and written.

Three kinds of rows, three readers: `read_sft` (sharegpt multimodal), `read_prompts` (alignment and
RLVR), `read_pairs` (discriminator warm-up). A file of any kind may be parquet, JSON lines or a JSON
list (files.py). A reader gives a length and random access by index. A file that is empty or holds
other rows is a ValueError at once; a single bad row raises RowError when it is read.

Images stay encoded bytes or a path until a row is turned into tokens.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from checkpoint_tools.files import write_atomically
from prism_megatron.data.files import BATCH_ROWS, Items, ParquetItems, open_items

ROLES = {"human": "user", "gpt": "assistant"}
TEACHER_SECTIONS = ("teacher_caption", "teacher_cot")
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


def read_system_prompt(file: Path | None) -> str | None:
    """The text of a system turn. The line end that ends every text file is no part of it; a prompt
    that ends with one, as the reference's, has another."""
    return file.read_text().removesuffix("\n") if file else None


RETRIES = (0.5, 2.0, 8.0)
"""Seconds before a file is read again that storage did not give."""
TRANSIENT = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EBUSY, errno.EREMOTEIO}
"""What network file systems say while a server is away."""


@dataclass(frozen=True)
class ImageSource:
    """An image that is not decoded yet: its encoded bytes, or the file that holds them."""

    data: bytes | None = None
    path: Path | None = None

    def read(self) -> bytes:
        """The encoded bytes; RowError if the file can't be read, after some more attempts where
        storage is at fault."""
        if self.data is not None:
            return self.data
        assert self.path is not None
        pauses = iter(RETRIES)
        while True:
            try:
                return self.path.read_bytes()
            except OSError as error:
                pause = next(pauses, None) if error.errno in TRANSIENT else None
                if pause is None:
                    raise RowError(f"missing image: {self.path} ({error.strerror})") from error
                time.sleep(pause)
            except ValueError as error:
                # the path has a NUL, or can't be encoded
                raise RowError(f"missing image: {self.path} ({error})") from error


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


@dataclass(frozen=True)
class FileOptions:
    """How a file is read that is not just as it was published.

    cache_dir: see open_items. media_dir: folder of the images; default is the file's own.
    mapping: makes a stored row one with the keys that the reader knows.
    """

    cache_dir: Path | None = None
    media_dir: Path | None = None
    mapping: Callable[[Any], Any] | None = None


AS_PUBLISHED = FileOptions()


class FileRows[R]:
    """Rows of one file, parsed one by one."""

    def __init__(
        self,
        path: Path,
        items: Items,
        parse: Callable[[Any, str, Path], R],
        options: FileOptions = AS_PUBLISHED,
    ):
        self.path = path
        self._items, self._parse = items, parse
        self._mapping = options.mapping
        self._media_dir = options.media_dir or path.parent

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> R:
        row_id = f"{self.path.stem}:{index}"
        try:
            return self._parse(self.stored(index), row_id, self._media_dir)
        except RecursionError as error:
            raise RowError(f"malformed row: nested too deep: {error}") from error

    def stored(self, index: int) -> Any:
        """The row as the file holds it, under the names that the reader knows."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {self.path}, which has {len(self)} rows")
        try:
            item = self._items[index]
        except (ValueError, RecursionError) as error:
            raise RowError(f"malformed row: not a JSON object: {error}") from error
        try:
            _check_texts(item)
            return self._mapping(item) if self._mapping else item
        except (TypeError, ValueError, RecursionError) as error:
            raise RowError(f"malformed row: {error}") from error

    @property
    def schema(self) -> pa.Schema | None:
        """Columns and their types, of a parquet file."""
        return self._items.schema if isinstance(self._items, ParquetItems) else None


class Read[R](Protocol):
    """One of the readers below."""

    def __call__(self, path: Path, /, options: FileOptions = ...) -> FileRows[R]: ...


def read_sft(path: Path, options: FileOptions = AS_PUBLISHED) -> FileRows[SFTRow]:
    """Rows of a sharegpt multimodal file.

    A row has `messages` (role, content) or `conversations` (from, value), and optionally `images`
    (bytes, {bytes, path}, or paths, absolute or relative to the file) and `system`; its last turn
    is the assistant's.
    """
    return _open(path, options, _sft_row, (("messages", "conversations"),))


def read_pairs(path: Path, options: FileOptions = AS_PUBLISHED) -> FileRows[PairRow]:
    """Rows of a warm-up file.

    A row has `prompt` (or `question`), the four sections `teacher_caption`, `student_caption`,
    `teacher_cot`, `student_cot`, and optionally `image` (a path) and `system`. A prompt without a
    literal <image> gets one in front when the row has an image.
    """
    wanted = (("prompt", "question"), *((key,) for key in PAIR_SECTIONS))
    return _open(path, options, _pair_row, wanted)


def read_prompts(
    path: Path, options: FileOptions = AS_PUBLISHED, *, required: tuple[str, ...] = ()
) -> FileRows[PromptRow]:
    """Rows of an alignment or RLVR file.

    Columns: `prompt` (list of role and content), `images` (list of bytes, of {bytes, path}, or of
    paths), `reward_model` {ground_truth}, and optionally `data_source`, `extra_info`,
    `teacher_response`, `teacher_caption`, `teacher_cot`. `required` names more columns that the
    file must have and that no row may leave empty: alignment needs the teacher's two sections.
    """
    wanted = ("prompt", "reward_model", *required)

    def parse(item: Any, row_id: str, folder: Path) -> PromptRow:
        return _prompt_row(item, row_id, folder, wanted)

    return _open(path, options, parse, tuple((name,) for name in wanted))


def _open[R](
    path: Path,
    options: FileOptions,
    parse: Callable[[Any, str, Path], R],
    wanted: tuple[tuple[str, ...], ...],
) -> FileRows[R]:
    """ValueError if no row is there, or none has all the wanted keys (each a tuple of names that
    will do)."""
    items = open_items(path, options.cache_dir)
    if not len(items):
        raise ValueError(f"{path} has no rows")
    rows = FileRows(path, items, parse, options)
    if items.columns is not None and options.mapping is None:
        found = [items.columns]
    else:
        found = [[k for k, value in item.items() if value is not None] for item in _first(rows)]
    if not any(all(set(names) & set(keys) for names in wanted) for keys in found):
        names = [" or ".join(names) for names in wanted]
        raise ValueError(f"no row of {path} has the keys {names}; the first has {found[:1]}")
    return rows


def _first(rows: FileRows[Any]) -> Iterable[dict[str, Any]]:
    """Those of the first hundred rows that are objects."""
    for index in range(min(100, len(rows))):
        try:
            item = rows.stored(index)
        except RowError:
            continue
        if isinstance(item, dict):
            yield item


IMAGES = pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
PROMPT_FIELDS: list[tuple[str, pa.DataType]] = [
    ("prompt", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
    ("images", IMAGES),
    ("teacher_response", pa.string()),
    ("teacher_caption", pa.string()),
    ("teacher_cot", pa.string()),
    ("data_source", pa.string()),
    ("answer", pa.string()),
    ("reward_model", pa.struct([("ground_truth", pa.string()), ("style", pa.string())])),
]
"""Columns of the published alignment and RLVR parquet files, but for `extra_info`."""


@contextmanager
def prompt_writer(path: Path, schema: pa.Schema) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """A function that adds one stored row to a parquet file that `read_prompts` reads.

    Memory holds BATCH_ROWS of them, and a row group too, so that one row is cheap to read. The file
    appears when all rows are written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    group: list[Mapping[str, Any]] = []

    def flush() -> None:
        writer.write_table(pa.Table.from_pylist(group, schema=schema))
        group.clear()

    def add(row: Mapping[str, Any]) -> None:
        group.append(row)
        if len(group) == BATCH_ROWS:
            flush()

    try:
        with pq.ParquetWriter(temporary, schema) as writer:
            yield add
            flush()
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def stored_images(images: Sequence[ImageSource]) -> list[dict[str, Any]]:
    """Images as the published parquet files hold them: encoded bytes. RowError as in `read`."""
    return [{"bytes": image.read(), "path": None} for image in images]


def write_pairs(path: Path, rows: Iterable[PairRow]) -> int:
    """Write warm-up pairs as JSONL that `read_pairs` gives back, and return how many.

    Images given as bytes are written once each to `<stem>_images/` beside the file. RowError if
    `check_pair` refuses a row.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    written = 0
    with temporary.open("w") as file:
        for row in rows:
            check_pair(row)
            line = {"id": row.row_id, "prompt": row.question}
            if row.messages[0].role == "system":
                line["system"] = row.messages[0].content
            if row.images:
                line["image"] = _store_image(row, path)
            line |= {key: getattr(row, key) for key in PAIR_SECTIONS}
            file.write(json.dumps(line) + "\n")
            written += 1
    os.replace(temporary, path)
    return written


def check_pair(row: Row) -> None:
    """RowError if a warm-up file has no room for the row's prompt: one user turn, after a system
    turn or not, and at most one image."""
    roles = [turn.role for turn in row.messages]
    if roles not in (["user"], ["system", "user"]):
        raise RowError(f"several turns: {', '.join(roles)}; a warm-up pair holds system and user")
    if len(row.images) > 1:
        raise RowError(f"several images: {len(row.images)}; a warm-up pair holds one")


def _store_image(row: PairRow, path: Path) -> str:
    """Path to write for the row's image, relative to the JSONL where the image is stored there."""
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


def _check_texts(value: Any) -> None:
    """ValueError for a text that UTF-8 can't hold, which no tokenizer takes and no file: JSON can
    spell half a surrogate pair."""
    if isinstance(value, str):
        value.encode()
    elif isinstance(value, Mapping):
        _check_texts(list(value.items()))
    elif isinstance(value, list | tuple):
        for each in value:
            _check_texts(each)


def _text(item: Mapping[str, Any], *names: str) -> str:
    """The first of the named values that is there; RowError if none is a non-empty string."""
    value = next((item[name] for name in names if item.get(name)), None)
    if not isinstance(value, str):
        raise RowError(f"missing required column {' or '.join(map(repr, names))}")
    return value


def _optional_text(item: Mapping[str, Any], name: str) -> str | None:
    value = item.get(name)
    if value is not None and not isinstance(value, str):
        raise RowError(f"malformed {name!r}: a text is wanted, not {type(value).__name__}")
    return value


def _messages(turns: Any, column: str) -> tuple[Message, ...]:
    if not isinstance(turns, list) or not turns:
        raise RowError(f"missing required column {column!r}")
    messages = []
    for turn in turns:
        if not isinstance(turn, dict):
            kind = type(turn).__name__
            raise RowError(f"malformed {column!r}: a turn is an object, not {kind}")
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if not isinstance(role, str) or not isinstance(content, str):
            raise RowError(f"malformed {column!r}: a turn needs a role and a text, not {turn}")
        messages.append(Message(ROLES.get(role, role), content))
    return tuple(messages)


def _images(values: Any, folder: Path) -> tuple[ImageSource, ...]:
    if not isinstance(values or [], list):
        raise RowError(f"malformed 'images': a list is wanted, not {type(values).__name__}")
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


def _check_object(item: Any) -> None:
    if not isinstance(item, dict):
        raise RowError(f"malformed row: a JSON object is wanted, not a {type(item).__name__}")


def _sft_row(item: Any, row_id: str, folder: Path) -> SFTRow:
    _check_object(item)
    column = "messages" if "messages" in item else "conversations"
    *prompt, last = _messages(item.get(column), column)
    if last.role != "assistant" or not last.content or not prompt:
        raise RowError(f"malformed {column!r}: it must end with an assistant turn after others")
    if system := _optional_text(item, "system"):
        prompt.insert(0, Message("system", system))
    images = _images(item.get("images"), folder)
    return SFTRow(row_id, tuple(prompt), images, response=last.content)


def _pair_row(item: Any, row_id: str, folder: Path) -> PairRow:
    _check_object(item)
    text = _text(item, "prompt", "question")
    images = _images([item["image"]] if item.get("image") else [], folder)
    if images and "<image>" not in text:
        text = f"<image>\n{text}"
    turns = [Message("user", text)]
    if item.get("system"):
        turns.insert(0, Message("system", _text(item, "system")))
    sections = {key: _text(item, key) for key in PAIR_SECTIONS}
    return PairRow(str(item.get("id", row_id)), tuple(turns), images, **sections)


def _prompt_row(item: Any, row_id: str, folder: Path, required: tuple[str, ...]) -> PromptRow:
    _check_object(item)
    for column in required:
        if not item.get(column):
            raise RowError(f"missing required column {column!r}")
    if item.get("videos"):
        raise RowError("video: only images are supported")
    reward, extra = item["reward_model"], item.get("extra_info") or {}
    truth = reward.get("ground_truth") if isinstance(reward, dict) else None
    if truth is None or truth == "":
        raise RowError("missing required column 'reward_model.ground_truth'")
    equivalents = reward.get("equivalent_answers") or []
    if not isinstance(equivalents, list):
        kind = type(equivalents).__name__
        raise RowError(f"malformed 'equivalent_answers': a list is wanted, not {kind}")
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
        data_source=_optional_text(item, "data_source") or "",
        equivalents=tuple(map(str, equivalents)),
        teacher_response=_optional_text(item, "teacher_response"),
        teacher_caption=_optional_text(item, "teacher_caption"),
        teacher_cot=_optional_text(item, "teacher_cot"),
        extra_info=extra,
    )
