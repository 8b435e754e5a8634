"""How a command ends: one message for a mistake of the user, a traceback for one of ours."""

from __future__ import annotations

import errno
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

OUR_PACKAGES = ("prism_megatron", "checkpoint_tools", "model_providers")
REQUEUE = os.EX_TEMPFAIL
"""Exit status of a process that was asked to end before it had finished: start it again."""
DISK_ERRORS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS),
    *(errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG),
}
"""What a file system refuses for reasons that whoever runs the command can do something about."""
REQUEUE_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""What schedulers ask with."""


def exit_status(command: Callable[..., int | None], *args: Any) -> int:
    """Run a command; its exit status, 2 if the user has to mend something."""
    try:
        return int(command(*args) or 0)
    except (ValueError, OSError) as error:
        if not _is_mistake_of_user(error):
            raise
        _report(error)
        return 2


@contextmanager
def requeued_when_asked() -> Iterator[None]:
    """Until something that has work to save takes the signals over, they end the process at once,
    with the status that has it started again."""

    def end(number: int, frame: FrameType | None) -> None:
        # an exception may be raised where Python swallows it, as in a finaliser
        os._exit(REQUEUE)

    before = {number: signal.signal(number, end) for number in REQUEUE_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _is_mistake_of_user(error: Exception) -> bool:
    """Whether our own code raised it on purpose, rather than a library because of a defect."""
    if isinstance(error, OSError):
        return isinstance(error, FileNotFoundError) or error.errno in DISK_ERRORS
    return _raised_in(error).startswith(OUR_PACKAGES)


def _raised_in(error: Exception) -> str:
    """Name of the module that raised."""
    trace = error.__traceback__
    assert trace is not None, "a caught exception has a traceback"
    while trace.tb_next is not None:
        trace = trace.tb_next
    name = str(trace.tb_frame.f_globals.get("__name__", ""))
    # a tool that is run by its path or with -m
    return "checkpoint_tools" if name == "__main__" else name


def _report(error: Exception) -> None:
    """Print the message; once for a configuration, which every rank reads alike."""
    if rank() and _raised_in(error).startswith(("prism_megatron.config", "prism_megatron.cli")):
        return
    if os.environ.get("PRISM_TRACEBACK") == "1":
        traceback.print_exception(error)
        return
    prefix = f"prism-megatron (rank {rank()})" if rank() else "prism-megatron"
    print(f"{prefix}: {error}", file=sys.stderr)


def rank() -> int:
    """This process's rank in the world that a launcher started, before any is joined."""
    return int(os.environ.get("RANK", "0"))
