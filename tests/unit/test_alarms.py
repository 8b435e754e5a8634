"""Alarms ring after enough steps running, once, and only for what is there."""

from __future__ import annotations

import pytest

from prism_megatron.config import schema
from prism_megatron.training.alarms import Alarms


def test_an_alarm_begins_after_the_steps_and_ends_with_the_value(
    capsys: pytest.CaptureFixture[str],
) -> None:
    alarms = Alarms(schema.Alarms(accuracy_above=0.9, patience=3))
    values = [0.95, 0.95, 0.8, 0.95, 0.95, 0.95, 0.95, 0.9]
    active = [
        alarms.check({"caption_accuracy": v, "reasoning_accuracy": 0.6}, i)["alarms"]
        for i, v in enumerate(values, 1)
    ]
    assert active == [0, 0, 0, 0, 0, 1, 1, 0]
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("ALARM at step 6: caption_accuracy=0.95 is beyond")
    assert "alarms.accuracy_above=0.9 for 3 steps; lower discriminator_optimizer.lr" in line


@pytest.mark.parametrize(
    ("threshold", "metric", "bad", "good"),
    [
        ("accuracy_above", "reasoning_accuracy", 0.8, 0.7),
        ("accuracy_below", "caption_accuracy", 0.2, 0.5),
        ("accuracy_above", "response_accuracy", 0.8, 0.7),
        ("margin_above", "score_gap", 3.5, -4.0),
        ("load_entropy_below", "load_entropy", 0.3, 0.9),
    ],
)
def test_every_threshold_has_its_side(threshold: str, metric: str, bad: float, good: float) -> None:
    limits = {"accuracy_above": 0.75, "accuracy_below": 0.4, "margin_above": 3.0,
              "load_entropy_below": 0.6}  # fmt: skip
    off = dict.fromkeys(limits, None)
    config = schema.Alarms(**(off | {threshold: limits[threshold]}), patience=1, action="stop")
    Alarms(config).check({metric: good}, 1)
    with pytest.raises(ValueError, match=f"{metric}=.* beyond alarms.{threshold}"):
        Alarms(config).check({metric: bad}, 1)
    Alarms(schema.Alarms(**off, patience=1, action="stop")).check({metric: bad}, 1)


def test_a_step_without_the_metric_changes_nothing() -> None:
    alarms = Alarms(schema.Alarms(margin_above=1.0, patience=2))
    steps: list[dict[str, float]] = [{"score_gap": 2.0}, {}, {"score_gap": 2.0}]
    assert [alarms.check(step, i)["alarms"] for i, step in enumerate(steps, 1)] == [0, 0, 1]


def test_steps_that_are_taken_again_are_counted_once() -> None:
    alarms = Alarms(schema.Alarms(margin_above=1.0, patience=3))
    found = [alarms.check({"score_gap": 2.0}, step)["alarms"] for step in (1, 2, 1, 2, 3, 4)]
    assert found == [0, 0, 0, 0, 1, 1]
