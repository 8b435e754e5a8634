"""A loss or a gradient norm that is not finite, or far above what it was, does not become an
update: it stops the run, the update is skipped, or the run goes back to its last checkpoint.

    loss, gradient norm --finite?--> above `spike` medians of the last `window`? --> update
"""

from __future__ import annotations

import math
import sys
from collections import deque
from statistics import median
from typing import Any

from checkpoint_tools.command import rank
from prism_megatron.config import schema


class Unsound(FloatingPointError):
    """An update that was not made, for which the run stops or goes back."""


class UnsoundInference(Unsound):
    """A model infers what is not finite, so that there is nothing to make the step's updates of."""


class Guard:
    """Judges every update of one model before it is made, or every step."""

    def __init__(self, config: schema.Guard) -> None:
        self.config = config
        self.skipped = 0
        """Updates since `take_skipped`."""
        self._in_a_row = 0
        self._seen: dict[str, deque[float]] = {}

    def judge(self, values: dict[str, float]) -> str:
        """What is wrong with an update of these values, or nothing."""
        return "; ".join(filter(None, (self._judge(*named) for named in values.items())))

    def accept(self, values: dict[str, float]) -> None:
        """The update is made; its values are usual ones."""
        for name, value in values.items():
            self._seen.setdefault(name, deque(maxlen=self.config.window)).append(value)
        self._in_a_row = 0

    def refuse(self, problem: str) -> None:
        """The update is not made; Unsound unless the configuration has it skipped, and has not had
        `limit` of them skipped in a row."""
        if self.config.action != "skip":
            raise Unsound(problem)
        if self._in_a_row == self.config.limit:
            raise Unsound(
                f"{problem}; {self.config.limit} updates in a row were skipped before "
                "(train.guard.limit)"
            )
        self._in_a_row += 1
        self.skipped += 1
        if rank() == 0:
            print(f"update skipped: {problem}", file=sys.stderr, flush=True)

    def _judge(self, name: str, value: float) -> str:
        if not math.isfinite(value):
            return f"{name} is {value}"
        seen, spike = self._seen.get(name, ()), self.config.spike
        if spike is None or len(seen) < self.config.window:
            return ""
        usual = median(seen)
        # around zero, as a policy's loss, nothing is many times anything
        if usual <= 0 or value <= spike * usual:
            return ""
        return (
            f"{name}={value:.4g} is above train.guard.spike={spike:g} times {usual:.4g}, the "
            f"median of the last {len(seen)} updates"
        )

    def take_skipped(self) -> int:
        """Updates skipped since the last call."""
        found, self.skipped = self.skipped, 0
        return found

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds, as JSON."""
        return {"in_a_row": self._in_a_row, "seen": {k: list(v) for k, v in self._seen.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._in_a_row = state["in_a_row"]
        self._seen = {k: deque(v, maxlen=self.config.window) for k, v in state["seen"].items()}
