"""Random access to the rows of a data file of any size: JSON lines, one JSON list, or parquet.

    JSON     scanned once --> where each row begins and ends --> kept in the cache folder
    parquet  its row groups; a file whose groups are too large to be read for one row is copied
             once to small batches of an Arrow file in the cache folder
    row i    read from its place when it is asked for

Nothing of a file stays in memory but the row groups that were touched last. What is in the cache
folder is known by path, size and time of the file that it was made from, and appears there whole.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock
from numpy.typing import NDArray

CACHED_GROUPS = 4
LARGE_GROUP = 64 * 2**20
"""Bytes of a parquet row group, decompressed, above which it is not read for a single row."""
BATCH_ROWS = 64
"""Rows of an Arrow batch, and of a parquet row group that is written here."""
SMALL_FILE = 64 * 2**20
"""Bytes of a JSON file up to which it is scanned at every start, in a fraction of a second."""
CHUNK = 16 * 2**20

BOM = b"\xef\xbb\xbf"
QUOTE, BACKSLASH, COMMA, NEWLINE = b'"\\,\n'
_OUTER = np.isin(np.arange(256), list(b",[]{}"))
_MARKS = _OUTER | np.isin(np.arange(256), [QUOTE, BACKSLASH])
_STEPS = np.array([(chr(i) in "[{") - (chr(i) in "]}") for i in range(256)])
"""How much deeper it is after a byte that stands outside of strings."""

Bounds = NDArray[np.int64]
"""[rows, 2]: first byte of each row, and the byte after its last."""


def default_cache() -> Path:
    """$XDG_CACHE_HOME/prism-megatron, or ~/.cache/prism-megatron."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "prism-megatron"


class Items(Protocol):
    """The rows of one file as they are stored; columns: None where every row has its own keys."""

    columns: list[str] | None

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any:
        """Row `index`; ValueError if it can't be parsed."""
        ...


def open_items(path: Path, cache_dir: Path | None = None) -> Items:
    """The rows of a file, which is looked at to tell its format.

    cache_dir: where indexes and copies are kept; default_cache() if not given. ValueError if the
    file is of no known format or not whole.
    """
    cache_dir = cache_dir or default_cache()
    with path.open("rb") as file:
        head = file.read(4096)
    if head.startswith(b"PAR1"):
        return ParquetItems(path, cache_dir)
    text = head.removeprefix(BOM).lstrip()
    if text.startswith(b"["):
        return JSONItems(path, _cached_bounds(path, cache_dir, scan_list))
    if not text or text.startswith(b"{") or path.suffix == ".jsonl":
        return JSONItems(path, _cached_bounds(path, cache_dir, scan_lines))
    raise ValueError(
        f"{path} is neither parquet nor JSON (a list, or an object a line): it begins with "
        f"{text[:20]!r}"
    )


class JSONItems:
    """Rows of a JSON file, each read and parsed when it is asked for, by any number of threads."""

    columns: list[str] | None = None

    def __init__(self, path: Path, bounds: Bounds):
        self._file = path.open("rb", buffering=0)
        self._bounds = bounds

    def __len__(self) -> int:
        return len(self._bounds)

    def __getitem__(self, index: int) -> Any:
        start, end = (int(place) for place in self._bounds[index])
        return json.loads(os.pread(self._file.fileno(), end - start, start))


class ParquetItems:
    """Rows of a parquet file, read a row group (or a batch of its copy) at a time."""

    def __init__(self, path: Path, cache_dir: Path):
        try:
            file = _parquet_file(path)
        except pa.ArrowInvalid as error:
            raise ValueError(f"{path} is not a whole parquet file: {error}") from error
        self.schema: pa.Schema = file.schema_arrow.remove_metadata()
        self.columns: list[str] | None = list(self.schema.names)
        groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
        if any(group.total_byte_size > LARGE_GROUP for group in groups):
            file.close()
            copy = _made_once(path, cache_dir, ".arrow", lambda out: _copy_to_arrow(path, out))
            reader = pa.ipc.open_file(pa.memory_map(str(copy)))
            sizes = [reader.get_batch(i).num_rows for i in range(reader.num_record_batches)]
            read = reader.get_batch
        else:
            sizes = [group.num_rows for group in groups]
            read = file.read_row_group
        self._starts = np.cumsum([0, *sizes])
        self._group = lru_cache(CACHED_GROUPS)(read)
        self._lock = Lock()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Any:
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        with self._lock:
            group = self._group(number)
        return group.slice(index - int(self._starts[number]), 1).to_pylist()[0]


def scan_lines(path: Path) -> Bounds:
    """Where the lines of a file are, those without text left out."""
    newlines = []
    offset = 0
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(CHUNK):
            newlines.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == NEWLINE) + offset)
            offset += len(chunk)
        ends = np.append(np.concatenate(newlines), offset) if newlines else np.zeros(1, np.int64)
        starts = np.append(0, ends[:-1] + 1)
        keep = ends > starts
        # what is longer than this and blank is a bad row rather than a blank line
        for i in np.flatnonzero(keep & (ends - starts < 16)):
            line = os.pread(file.fileno(), int(ends[i] - starts[i]), int(starts[i]))
            keep[i] = bool(line.strip())
    return np.stack([starts[keep], ends[keep]], axis=1)


def scan_list(path: Path) -> Bounds:
    """Where the elements of a JSON list are; ValueError if the list does not end where the file
    does. Each element is checked when it is parsed.

    Of each chunk only quotes, backslashes, commas and brackets are looked at, all at once: which
    of them are escaped, which stand in strings, and how deep the others nest.
    """
    separators: list[NDArray[np.int64]] = []
    offset, depth, closed_at = 0, 0, -1
    is_escaped = in_string = False
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(CHUNK):
            data = np.frombuffer(chunk, np.uint8)
            places = np.flatnonzero(_MARKS[data])
            marks = data[places]
            escaped = np.zeros(len(data) + 1, bool)
            escaped[_escaped(places[marks == BACKSLASH], is_escaped)] = True
            is_escaped = bool(escaped[-1])
            quotes = np.cumsum((marks == QUOTE) & ~escaped[places]) + in_string
            in_string = bool(quotes[-1] % 2) if len(quotes) else in_string
            outside = (quotes % 2 == 0) & _OUTER[marks]
            others, marks = places[outside], marks[outside]
            steps = _STEPS[marks]
            depths = depth + np.cumsum(steps)
            depth = int(depths[-1]) if len(depths) else depth
            if closed_at >= 0 and len(others):
                raise _not_whole(path, closed_at)
            between = ((marks == COMMA) & (depths == 1)) | (depths == 0)
            separators.append(others[between] + offset)
            ends = np.flatnonzero(depths <= 0)
            if len(ends):
                closed_at = int(others[ends[0]]) + offset
                if ends[0] + 1 < len(others):
                    raise _not_whole(path, closed_at)
            offset += len(chunk)
        if closed_at < 0:
            raise ValueError(
                f"{path} is not a whole JSON list: it ends within row {sum(map(len, separators))}, "
                f"after {offset} bytes; was it cut off?"
            )
        if os.pread(file.fileno(), 4096, closed_at + 1).strip():
            raise _not_whole(path, closed_at)
        ends = np.concatenate(separators)
        head = os.pread(file.fileno(), 4096, 0)
        starts = np.append(head.index(b"[") + 1, ends[:-1] + 1)
        first, last = int(starts[0]), int(ends[0])
        if len(ends) == 1 and not os.pread(file.fileno(), last - first, first).strip():
            return np.zeros((0, 2), np.int64)
    return np.stack([starts, ends], axis=1)


def _not_whole(path: Path, place: int) -> ValueError:
    return ValueError(f"{path} is not JSON: its list ends at byte {place}, and more follows")


def _escaped(backslashes: NDArray[np.int64], is_first_escaped: bool) -> NDArray[np.int64]:
    """Places that a backslash before them escapes, ascending; that after the chunk included.

    Of a run of backslashes each second one is escaped, and what follows a run of odd length.
    """
    first = [0] if is_first_escaped else []
    if is_first_escaped and len(backslashes) and backslashes[0] == 0:
        backslashes = backslashes[1:]
    begins = np.flatnonzero(np.diff(backslashes, prepend=-2) != 1)
    lengths = np.diff(np.append(begins, len(backslashes)))
    after = backslashes[begins] + lengths
    return np.append(np.array(first, np.int64), after[lengths % 2 == 1])


def _cached_bounds(path: Path, cache_dir: Path, scan: Callable[[Path], Bounds]) -> Bounds:
    if path.stat().st_size <= SMALL_FILE:
        return scan(path)

    def make(out: Path) -> None:
        with out.open("wb") as file:
            np.save(file, scan(path))

    bounds: Bounds = np.load(_made_once(path, cache_dir, ".npy", make), mmap_mode="r")
    return bounds


def _parquet_file(path: Path) -> pq.ParquetFile:
    """Opened so that it holds what is asked for: pre-buffering reads a whole row group's columns
    for its first row."""
    return pq.ParquetFile(path, memory_map=True, pre_buffer=False)


def _copy_to_arrow(path: Path, out: Path) -> None:
    options = pa.ipc.IpcWriteOptions(unify_dictionaries=True)
    with (
        _parquet_file(path) as file,
        pa.ipc.new_file(str(out), file.schema_arrow, options=options) as writer,
    ):
        for batch in file.iter_batches(BATCH_ROWS, use_threads=False):
            writer.write_batch(batch)
    pa.default_memory_pool().release_unused()


def _made_once(source: Path, cache_dir: Path, suffix: str, make: Callable[[Path], None]) -> Path:
    """What `make` makes of `source`, from the cache folder if it is there and of this very file.

    One process of those that want it makes it; what was made of an older file at this path goes.
    """
    stat = source.stat()
    place = hashlib.sha256(str(source.resolve()).encode()).hexdigest()[:16]
    target = cache_dir / f"{place}-{stat.st_size}-{stat.st_mtime_ns}{suffix}"
    if target.exists():
        return target
    cache_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(cache_dir / f"{place}.lock"):
        if not target.exists():
            print(f"{source} ({stat.st_size / 2**30:.1f} GiB) is indexed once", flush=True)
            for old in (*cache_dir.glob(f"{place}-*{suffix}"), *cache_dir.glob(f".{place}-*")):
                old.unlink()
            temporary = cache_dir / f".{target.name}"
            make(temporary)
            os.replace(temporary, target)
    return target
