"""Alarms of a collapsing game: a metric beyond its threshold for so many steps running."""

from __future__ import annotations

import sys

from checkpoint_tools.command import rank
from prism_megatron.config import schema
from prism_megatron.objectives.sections import STREAMS
from prism_megatron.training.loop import Metrics

ACCURACIES = tuple(f"{name}_accuracy" for streams in STREAMS.values() for name in streams)
WATCHED = {
    "accuracy_above": (ACCURACIES, 1, "discriminator_optimizer.lr"),
    "accuracy_below": (ACCURACIES, -1, "policy_optimizer.lr"),
    "margin_above": (("score_gap",), 1, "discriminator_optimizer.lr"),
    "load_entropy_below": (("load_entropy",), -1, "discriminator_optimizer.lr"),
}
"""Threshold to its metrics, the side that is bad, and what to lower first. Each section's accuracy
is watched: the mean of a saturated one and another looks sound."""


class Alarms:
    """Counts steps beyond each threshold, in `steps`, which a checkpoint holds."""

    def __init__(self, config: schema.Alarms) -> None:
        self.config = config
        self.steps = dict.fromkeys(WATCHED, 0)
        self._last = 0

    def check(self, metrics: Metrics, step: int) -> Metrics:
        """The number of active alarms, as a metric. Prints each when it begins.

        Of a threshold's metrics the worst counts. Raises ValueError with action=stop. A metric that
        is absent in a step changes nothing.
        """
        if step <= self._last:
            # the run went back to a checkpoint, and these steps are taken again
            self.steps = dict.fromkeys(WATCHED, 0)
        self._last = step
        for name, (watched, side, lower) in WATCHED.items():
            limit = getattr(self.config, name)
            found = [metric for metric in watched if metric in metrics]
            if limit is None or not found:
                continue
            metric = max(found, key=lambda metric: metrics[metric] * side)
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
