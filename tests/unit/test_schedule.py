"""The learning rate of a run that goes on from a checkpoint."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from prism_megatron.config.schema import Optimizer
from prism_megatron.training.optimizer import build_scheduler

COSINE = {"lr": 1e-2, "schedule": "cosine", "warmup_steps": 3}


def rates(steps: int, state: dict[str, Any] | None = None, **section: Any) -> tuple[Any, Any]:
    """Of each update to come, and of a checkpoint after the fifth."""
    groups = [{"params": [], "lr": 0.0}]
    settings = Optimizer.model_validate(COSINE | section)
    scheduler = build_scheduler(settings, SimpleNamespace(param_groups=groups), steps)
    if state is not None:
        scheduler.load_state_dict(state)
    found, saved = [], None
    for step in range(scheduler.num_steps, steps):
        found.append((groups[0]["lr"], groups[0]["weight_decay"]))
        if step == 5:
            saved = scheduler.state_dict()
        scheduler.step(increment=1)
    return found, saved


def test_a_run_goes_on_at_the_rate_that_it_was_at() -> None:
    whole, state = rates(12)
    assert rates(12, state)[0] == whole[5:]
    assert len({rate for rate, _ in whole}) == 12


def test_a_checkpoint_says_where_a_schedule_is_and_the_configuration_what_it_is() -> None:
    _, state = rates(12)
    changed = {"lr": 5e-2, "warmup_steps": 2, "weight_decay": 0.3}
    whole, _ = rates(30, **changed)
    found, _ = rates(30, state, **changed)
    assert found == whole[5:] and len(found) == 25
    assert found[-1][0] > 0 and found[0] == pytest.approx((0.05 * 0.96, 0.3), rel=0.05)
