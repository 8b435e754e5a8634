"""Runs a command that ends with whoever started it: `python guard.py COMMAND...`

    starter ==pipe==> guard --> command and its children, in a session of their own
                 `==> watchdog, in another session

Standard input is a pipe that the starter holds and never writes to. It closes when the starter
ends, however it ends; then the watchdog ends the command's whole session, also if the guard was
killed, as Ray does with the children of a worker. When the command ends by itself, the children
that it leaves behind are ended too. The exit status is the command's.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time

GRACE_SECONDS = 5
"""From the request to end (SIGTERM) to the end (SIGKILL)."""


def main(command: list[str]) -> int:
    """Run `command` until it ends or standard input does."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    watchdog = os.fork()
    if watchdog == 0:
        os.setsid()
        os.read(0, 1)
        _end(process.pid)
        os._exit(0)
    status = process.wait()
    _signal(process.pid, signal.SIGKILL)
    os.kill(watchdog, signal.SIGKILL)
    return status if status >= 0 else 128 - status


def _end(group: int) -> None:
    """Ask the process group to end, and after a while end it."""
    deadline = time.monotonic() + GRACE_SECONDS
    exists = _signal(group, signal.SIGTERM)
    while exists and time.monotonic() < deadline:
        time.sleep(0.05)
        exists = _signal(group, 0)
    _signal(group, signal.SIGKILL)


def _signal(group: int, number: int) -> bool:
    """Whether there was such a group to send it to."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)
        return True
    return False


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
