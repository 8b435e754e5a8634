"""Files and folders that are either whole or not there."""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write under a temporary name and rename, so that a killed run leaves no half file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(temporary, path)


def sync(file: Path) -> None:
    """Wait until a file is on the disk; ValueError if that refuses it."""
    try:
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
    except OSError as error:
        raise ValueError(f"{file} could not be written: {error}") from error


class WriteBehind:
    """Syncs a finished file to the disk while the next one is made."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._last: tuple[Future[None], Callable[[], object]] | None = None

    def add(self, file: Path, check: Callable[[], object], commit: Callable[[], object]) -> None:
        """Run `check` now, and `commit` when `file` is on the disk too: at the next `add` or at
        `wait`. If the check raises, that never happens."""
        synced = self._thread.submit(sync, file)
        check()
        self.wait()
        self._last = synced, commit

    def wait(self) -> None:
        """Commit what is not yet; ValueError if the disk refused it."""
        if self._last is not None:
            (synced, commit), self._last = self._last, None
            synced.result()
            commit()


def forget(file: Path, start: int = 0, length: int = 0) -> None:
    """Take these bytes (default: all) of a file that is not read again out of the page cache.

    A conversion goes through many times the memory of a machine once. Left alone, its pages push
    out everybody else's, and each is a new one: a virtual machine, which has to ask its host for
    it, then takes most of its time for that.
    """
    with file.open("rb") as stream:
        os.posix_fadvise(stream.fileno(), start, length, os.POSIX_FADV_DONTNEED)


def new_folder(name: str) -> Path:
    """The `--out` of a tool, as argparse takes types: nothing of the user's is overwritten."""
    path = Path(name)
    if path.exists():
        raise argparse.ArgumentTypeError(f"{path} exists; remove it or choose another folder")
    return path


def staging_of(out: Path) -> Path:
    """Where a folder is built that will be `out`."""
    return out.with_name(f".{out.name}.partial")


def replace_folder(staging: Path, out: Path) -> None:
    """Rename, over an older `out` if there is one; at no time is neither of them there."""
    old = out.with_name(f".{out.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        os.replace(out, old)
    os.replace(staging, out)
    shutil.rmtree(old, ignore_errors=True)


def prepare_staging(out: Path, job: dict[str, Any], nbytes: int) -> Path:
    """The staging folder for `job`: the one that an equal job left when it was killed, with what it
    had finished, else an empty one.

    Raises:
        ValueError: the disk has no room for `nbytes` more.
    """
    staging, record = staging_of(out), json.dumps(job, sort_keys=True)
    if not (staging / "job.json").exists() or (staging / "job.json").read_text() != record:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        write_atomically(staging / "job.json", record)
    done = sum(file.stat().st_size for file in staging.rglob("*") if file.is_file())
    free = shutil.disk_usage(staging).free
    if nbytes - done > free:
        raise ValueError(
            f"{out} needs {(nbytes - done) / 2**30:.1f} GiB more and its disk has "
            f"{free / 2**30:.1f} GiB free; make room or choose another folder"
        )
    return staging


def publish(staging: Path, out: Path) -> None:
    """Give a finished staging folder its final name; killed before that, all of it is kept."""
    replace_folder(staging, out)
    (out / "job.json").unlink()


def identity(path: Path) -> dict[str, Any]:
    """Path, size and time of every file under `path`, by which a changed source is told."""
    files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.is_file())
    stats = {str(file): file.stat() for file in files}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}
