"""Alarms of a collapsing game: a metric beyond its threshold for so many steps running."""

from __future__ import annotations

import sys

from checkpoint_tools.command import rank
from prism_megatron.config import schema
from prism_megatron.training.loop import Metrics

WATCHED = {
    "accuracy_above": ("discriminator_accuracy", 1, "discriminator_optimizer.lr"),
    "accuracy_below": ("discriminator_accuracy", -1, "policy_optimizer.lr"),
    "margin_above": ("score_gap", 1, "discriminator_optimizer.lr"),
    "load_entropy_below": ("load_entropy", -1, "discriminator_optimizer.lr"),
}
"""Threshold to its metric, the side that is bad, and what to lower first."""


class Alarms:
    """Counts steps beyond each threshold, in `steps`, which a checkpoint holds."""

    def __init__(self, config: schema.Alarms) -> None:
        self.config = config
        self.steps = dict.fromkeys(WATCHED, 0)
        self._last = 0

    def check(self, metrics: Metrics, step: int) -> Metrics:
        """The number of active alarms, as a metric. Prints each when it begins.

        Raises ValueError with action=stop. A metric that is absent in a step changes nothing.
        """
        if step <= self._last:
            # the run went back to a checkpoint, and these steps are taken again
            self.steps = dict.fromkeys(WATCHED, 0)
        self._last = step
        for name, (metric, side, lower) in WATCHED.items():
            limit = getattr(self.config, name)
            if limit is None or metric not in metrics:
                continue
            value = metrics[metric]
            self.steps[name] = self.steps[name] + 1 if (value - limit) * side > 0 else 0
            if self.steps[name] == self.config.patience:
                message = (
                    f"ALARM at step {step}: {metric}={value:.4g} is beyond alarms.{name}={limit:g} "
                    f"for {self.config.patience} steps; lower {lower} or go on from an earlier "
                    "checkpoint"
                )
                if self.config.action == "stop":
                    raise ValueError(message)
                if rank() == 0:
                    print(message, file=sys.stderr, flush=True)
        return {"alarms": sum(n >= self.config.patience for n in self.steps.values())}
