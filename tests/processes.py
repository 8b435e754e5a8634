"""Processes that tests look for while they start and end."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable

import psutil


def matching(
    processes: Iterable[psutil.Process], wanted: Callable[[psutil.Process], bool]
) -> list[psutil.Process]:
    """Those that are wanted, in their order; one that ends while it is asked is not."""
    found = []
    for process in processes:
        with contextlib.suppress(psutil.Error):
            if wanted(process):
                found.append(process)
    return found


def started_by(pid: int, wanted: Callable[[psutil.Process], bool]) -> list[psutil.Process]:
    """What a process has started, and what that has, parents first: a fork that has yet to become
    another program comes after the process that it looks like."""
    return matching(psutil.Process(pid).children(recursive=True), wanted)


def gone(pids: Iterable[int], within: float = 10) -> bool:
    """Whether all these processes end; a zombie that nobody has waited for has ended too."""
    wanted = set(pids)
    left = [process for process in psutil.process_iter() if process.pid in wanted]
    deadline = time.monotonic() + within
    while left and time.monotonic() < deadline:
        time.sleep(0.05)
        left = matching(left, lambda p: p.is_running() and p.status() != psutil.STATUS_ZOMBIE)
    return not left
