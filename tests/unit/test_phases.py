"""Where the time goes, by a clock that the test sets."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest

from prism_megatron import phases


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Iterator[Clock]:
    clock = Clock()
    with mock.patch.object(phases, "time", clock):
        phases.take(0.0)
        yield clock


def test_an_inner_phase_counts_for_itself_alone(clock: Any) -> None:
    clock.now += 5
    with phases.phase("sync"):
        clock.now += 1
        with phases.phase("rollout"):
            clock.now += 2
        clock.now += 4
    phases.count("train_tokens", 3)
    phases.count("train_tokens", 4)
    assert phases.take(12.0) == {
        "time/sync": 5,
        "time/rollout": 2,
        "time/idle": 5,
        "train_tokens": 7,
    }
    assert phases.take(0.0) == {"time/idle": 0}


def test_a_phase_is_a_decorator_and_survives_errors(clock: Any) -> None:
    @phases.phase("train")
    def step(fails: bool) -> None:
        clock.now += 3
        if fails:
            raise KeyError

    step(False)
    with pytest.raises(KeyError):
        step(True)
    clock.now += 1
    assert phases.take(7.0) == {"time/train": 6, "time/idle": 1}
