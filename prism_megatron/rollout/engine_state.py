"""The life of one rollout engine as its fleet sees it: pure logic, without Ray or a network.

      restart          is up          answered with the expected version
 DEAD ------> RESTARTING ---> STALE ------------------------------------> HEALTHY
   ^              |           |  ^  ^                                      |   ^
   |              |           |  |  |__ another version is expected, or ___|   |
   |              |           |  |      answered with another                  |
   |   process    |  k times  |  |                                     failed  | answered
   |    ended     |  failed   |  |_______ the same _______  SUSPECT <------+   |
   +--------------+-----------+--------- k times failed ______|  |_____________|

Only a HEALTHY engine gets requests. A SUSPECT one failed lately and is asked for its health; a
STALE one answers, but not with the weights of now.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

Probe = Literal["request", "check"]
"""What an engine answered or failed at: a request for rollouts, or a health check."""


class EngineState(StrEnum):
    """See the drawing above."""

    HEALTHY = "healthy"
    SUSPECT = "suspect"
    DEAD = "dead"
    RESTARTING = "restarting"
    STALE = "stale"


SERVING = (EngineState.HEALTHY, EngineState.SUSPECT)
UP = (*SERVING, EngineState.STALE)


class EngineHealth:
    """Events in, state out. An event that can't happen in a state is a defect of the caller.

    An engine is DEAD before its first start. Failures are counted in a row and for each kind of
    probe apart: an engine whose health checks pass while every request times out is dead too.
    """

    def __init__(self, max_failures: int) -> None:
        """max_failures: k, after which an engine that fails is given up."""
        self.state = EngineState.DEAD
        self.max_failures = max_failures
        self.failures: dict[Probe, int] = {"request": 0, "check": 0}

    def restart(self) -> None:
        """A new process is being started."""
        assert self.state is EngineState.DEAD, f"restart of an engine that is {self.state}"
        self.failures = {"request": 0, "check": 0}
        self.state = EngineState.RESTARTING

    def is_up(self) -> None:
        """The new process answers; whatever weights it has, they are none that were sent to it."""
        assert self.state is EngineState.RESTARTING, f"start of an engine that is {self.state}"
        self.state = EngineState.STALE

    def expect_other_weights(self) -> None:
        """A new version is about to be sent."""
        assert self.state in UP, f"weights for an engine that is {self.state}"
        self.state = EngineState.STALE

    def answered(self, probe: Probe, version: int, expected: int) -> None:
        """An answer with the weight version `version`, where `expected` is the one of now."""
        assert self.state in UP, f"an answer from an engine that is {self.state}"
        self.failures[probe] = 0
        self.state = EngineState.HEALTHY if version == expected else EngineState.STALE

    def failed(self, probe: Probe) -> None:
        """No answer in time, or a wrong one."""
        assert self.state in UP, f"a failure of an engine that is {self.state}"
        self.failures[probe] += 1
        if self.failures[probe] >= self.max_failures:
            self.state = EngineState.DEAD
        elif self.state is EngineState.HEALTHY:
            self.state = EngineState.SUSPECT

    def died(self) -> None:
        """Its process has ended, or did not come up."""
        assert self.state is not EngineState.DEAD, "an engine died twice"
        self.state = EngineState.DEAD
