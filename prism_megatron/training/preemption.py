"""SIGTERM and SIGUSR1: every rank ends the step, saves, and exits for its job to be queued again.

signal at any rank --> all ranks agree after the step --> checkpoint --> exit status REQUEUE
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any, Self

from checkpoint_tools.command import REQUEUE_SIGNALS, rank


class Preemption:
    """Notes that this process was asked to end, from `with` to its end."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        # signals belong to the main thread, and so does a run unless it is embedded in something
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._note) for s in REQUEUE_SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        for each in REQUEUE_SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        name = signal.Signals(number).name
        # print is not reentrant
        words = f"rank {rank()}: {name}, ends after this step's checkpoint; at once if sent again\n"
        os.write(2, words.encode())
