"""Runs a command that ends with whoever started it: `python -m prism_megatron.rollout.guard CMD...`

    starter ==pipe==> guard --> command and its children, in a session of their own

Standard input is a pipe that the starter holds and never writes to. It closes when the starter
ends, however it ends, and then the whole session of the command is ended; so it is when the command
ends and leaves children behind. The exit status is the command's.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading

GRACE_SECONDS = 5
"""From the request to end (SIGTERM) to the end (SIGKILL)."""


def main(command: list[str]) -> int:
    """Run `command` until it ends or standard input does."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    threading.Thread(target=_end_with_the_starter, args=(process,), daemon=True).start()
    status = process.wait()
    _signal(process.pid, signal.SIGKILL)
    return status if status >= 0 else 128 - status


def _end_with_the_starter(process: subprocess.Popen[bytes]) -> None:
    os.read(0, 1)
    _signal(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE_SECONDS)
    _signal(process.pid, signal.SIGKILL)


def _signal(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
