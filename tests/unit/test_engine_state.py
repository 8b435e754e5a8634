"""Every event in every state of an engine: the state after it, or a refusal."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from prism_megatron.rollout.engine_state import EngineHealth, EngineState

DEAD, RESTARTING, STALE = EngineState.DEAD, EngineState.RESTARTING, EngineState.STALE
HEALTHY, SUSPECT = EngineState.HEALTHY, EngineState.SUSPECT
NEW, OLD = 7, 6

Event = Callable[[EngineHealth], None]
EVENTS: dict[str, Event] = {
    "restart": EngineHealth.restart,
    "is_up": EngineHealth.is_up,
    "expect": EngineHealth.expect_other_weights,
    "request": lambda health: health.answered("request", NEW, NEW),
    "request, old": lambda health: health.answered("request", OLD, NEW),
    "check": lambda health: health.answered("check", NEW, NEW),
    "check, old": lambda health: health.answered("check", OLD, NEW),
    "request failed": lambda health: health.failed("request"),
    "check failed": lambda health: health.failed("check"),
    "died": EngineHealth.died,
}
ANSWERS = {"request": HEALTHY, "request, old": STALE, "check": HEALTHY, "check, old": STALE}
UP = ANSWERS | {"expect": STALE, "died": DEAD}
NEXT: dict[EngineState, dict[str, EngineState]] = {
    DEAD: {"restart": RESTARTING},
    RESTARTING: {"is_up": STALE, "died": DEAD},
    STALE: UP | {"request failed": STALE, "check failed": STALE},
    HEALTHY: UP | {"request failed": SUSPECT, "check failed": SUSPECT},
    SUSPECT: UP | {"request failed": SUSPECT, "check failed": DEAD},
}
"""With two failures allowed; the suspect one has failed a health check."""
WAYS = {
    DEAD: [],
    RESTARTING: ["restart"],
    STALE: ["restart", "is_up"],
    HEALTHY: ["restart", "is_up", "check"],
    SUSPECT: ["restart", "is_up", "check", "check failed"],
}


def engine(state: EngineState, max_failures: int = 2) -> EngineHealth:
    health = EngineHealth(max_failures)
    for event in WAYS[state]:
        EVENTS[event](health)
    assert health.state is state
    return health


@pytest.mark.parametrize("state", EngineState)
@pytest.mark.parametrize("event", EVENTS)
def test_every_event_in_every_state(state: EngineState, event: str) -> None:
    health = engine(state)
    if event in NEXT[state]:
        EVENTS[event](health)
        assert health.state is NEXT[state][event]
    else:
        with pytest.raises(AssertionError, match="engine"):
            EVENTS[event](health)
        assert health.state is state


@pytest.mark.parametrize("failure", ["request failed", "check failed"])
@pytest.mark.parametrize("allowed", [1, 2, 5])
def test_an_engine_is_dead_at_the_last_failure_in_a_row(failure: str, allowed: int) -> None:
    health = engine(HEALTHY, allowed)
    for _ in range(allowed - 1):
        EVENTS[failure](health)
        assert health.state is SUSPECT
    EVENTS[failure](health)
    assert health.state is DEAD


def test_only_an_answer_of_the_same_kind_ends_a_row_of_failures() -> None:
    health = engine(HEALTHY, 3)
    for event in ("request failed", "check", "request failed", "check", "request failed"):
        EVENTS[event](health)
    assert health.state is DEAD
    health = engine(HEALTHY, 3)
    for event in ("request failed", "request failed", "request", "request failed"):
        EVENTS[event](health)
    assert health.state is SUSPECT


def test_a_stale_engine_that_keeps_failing_is_dead() -> None:
    health = engine(STALE, 2)
    EVENTS["check failed"](health)
    assert health.state is STALE
    EVENTS["check failed"](health)
    assert health.state is DEAD


def test_failures_of_an_earlier_process_are_forgotten() -> None:
    health = engine(SUSPECT, 2)
    for event in ("died", "restart", "is_up", "check failed"):
        EVENTS[event](health)
    assert health.state is STALE
