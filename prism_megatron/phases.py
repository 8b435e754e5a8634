"""Where a step's time goes: seconds by phase on this rank, and counts of what was done.

    with phase("sync"): ...      @phase("train") def ...      count("train_tokens", 512)
    phases.take(9.0) -> {"time/rollout": ..., "time/train": ..., "time/idle": ...,
                         "train_tokens": ...}, and starts anew

Within another phase time counts for the inner one alone. A phase must end with its results on the
host, since nothing here waits for a device.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

Phase = Literal["rollout", "score", "log_probs", "train", "sync"]
"""Waiting for responses; rewards and scores; log-probabilities before an update;
forward, backward and update of either model; weights to the engines. What training waits for
checkpoints comes after a step (training/saving.py)."""

# one process runs one stage, whose parts need not know who keeps the time
_seconds: defaultdict[str, float] = defaultdict(float)
_counts: defaultdict[str, float] = defaultdict(float)
_open: list[str] = []
_since = 0.0


@contextmanager
def phase(name: Phase) -> Iterator[None]:
    """What runs inside is of this phase; also a decorator."""
    _switch()
    _open.append(name)
    try:
        yield
    finally:
        _switch()
        _open.pop()


def count(name: str, amount: float) -> None:
    """Add to a count of the step."""
    _counts[name] += amount


def take(step_seconds: float) -> dict[str, float]:
    """Seconds and counts since the last call, as metrics; idle is what a step of so many seconds
    spent in no phase."""
    found = {f"time/{name}": seconds for name, seconds in _seconds.items()}
    found |= {"time/idle": max(0.0, step_seconds - sum(_seconds.values()))} | _counts
    _seconds.clear()
    _counts.clear()
    return found


def _switch() -> None:
    """Credit the time since the last switch to the innermost phase."""
    global _since
    now = time.monotonic()
    if _open:
        _seconds[_open[-1]] += now - _since
    _since = now
