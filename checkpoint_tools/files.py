"""Files and folders that are either whole or not there."""

from __future__ import annotations

import argparse
import errno
import fcntl
import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

JOB, LOCK = "job.json", "job.lock"
"""What a staging folder holds beside what it is made for."""
_locks: dict[Path, IO[str]] = {}
"""Of the staging folders that this process writes; the system frees them when it ends."""


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write under a temporary name and rename, so that a killed run leaves no half file; ValueError
    if the disk refuses it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(temporary, path)
    except OSError as error:
        raise ValueError(f"{path} could not be written: {error}") from error


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
    it, then takes most of its time for that. Of a file that is gone there are none.
    """
    with suppress(FileNotFoundError), file.open("rb") as stream:
        os.posix_fadvise(stream.fileno(), start, length, os.POSIX_FADV_DONTNEED)


def new_folder(name: str) -> Path:
    """The `--out` of a tool, as argparse takes types: nothing of the user's is overwritten."""
    path = Path(name)
    if path.exists():
        raise argparse.ArgumentTypeError(f"{path} exists; remove it or choose another folder")
    return path


def check_replaceable(
    out: Path, sources: Sequence[Path], is_result: Callable[[Path], bool]
) -> None:
    """ValueError if writing the folder `out` would remove anything but an earlier result."""
    for source in sources:
        if source.resolve().is_relative_to(out.resolve()):
            raise ValueError(f"out={out} would replace {source}, which it is made from")
    if out.exists() and not out.is_dir():
        raise ValueError(f"out={out} is a file; choose another place")
    if out.exists() and any(out.iterdir()) and not is_result(out):
        raise ValueError(
            f"out={out} holds something else than an earlier result of this stage, which would be "
            "lost; choose another folder, or remove it"
        )


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
    had finished, else an empty one. Until `publish`, or its end, it is this process's alone.

    job: under "from" the `identity` of its sources, beside it what is made of them.

    Raises:
        ValueError: another process writes `out`, or the disk has no room for `nbytes` more.
    """
    staging, record = staging_of(out), json.dumps(job, sort_keys=True)
    staging.mkdir(parents=True, exist_ok=True)
    _lock(staging, out)
    if not (staging / JOB).exists() or (staging / JOB).read_text() != record:
        for path in staging.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != LOCK:
                path.unlink()
        write_atomically(staging / JOB, record)
    done = sum(file.stat().st_size for file in staging.rglob("*") if file.is_file())
    check_room(out, nbytes - done)
    return staging


def check_room(out: Path, nbytes: int) -> None:
    """ValueError if the disk of `out`, whose parent exists, has no room for `nbytes` more."""
    free = shutil.disk_usage(out.parent).free
    if nbytes > free:
        raise ValueError(
            f"{out} needs {nbytes / 2**30:.3g} GiB more and its disk has {free / 2**30:.3g} GiB "
            "free; make room or choose another folder"
        )


def _lock(staging: Path, out: Path) -> None:
    """ValueError if another process writes the folder."""
    if staging in _locks:
        # an earlier attempt of this process
        _locks.pop(staging).close()
    stream = (staging / LOCK).open("a")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # whoever had it may have given the folder its final name since it was opened
        is_free = os.path.samestat(os.fstat(stream.fileno()), os.stat(staging / LOCK))
    except (BlockingIOError, FileNotFoundError):
        is_free = False
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        print(
            f"{staging} can't be locked ({error.strerror}); let no other process write {out}",
            file=sys.stderr,
        )
        is_free = True
    if not is_free:
        stream.close()
        raise ValueError(
            f"{out} is being written by another process; wait for it or choose another folder"
        )
    _locks[staging] = stream


def publish(staging: Path, out: Path) -> None:
    """Give a finished staging folder its final name; killed before that, all of it is kept.

    Raises ValueError if a source was changed since `prepare_staging`, so that one part may be of
    the old and one of the new. One that was removed since was read to its end before.
    """
    job = json.loads((staging / JOB).read_text())
    for name, was in job["from"].items():
        if Path(name).exists() and _size_and_time(Path(name)) != was:
            raise ValueError(
                f"{name} was changed while {out} was made of it; {out} is not written, start again"
            )
    replace_folder(staging, out)
    (out / JOB).unlink()
    (out / LOCK).unlink()
    _locks.pop(staging).close()


def identity(*paths: Path) -> dict[str, list[int]]:
    """Size and time of every file under the paths, by which a changed source is told."""
    found = {}
    for path in paths:
        files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.is_file())
        found |= {str(file.absolute()): _size_and_time(file) for file in files}
    return found


def _size_and_time(file: Path) -> list[int]:
    stat = file.stat()
    return [stat.st_size, stat.st_mtime_ns]
