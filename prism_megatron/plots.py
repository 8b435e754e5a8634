"""Figures: the report's (accuracy by stage above, one training curve a panel below), the lengths of
data-stats, and arms of an experiment beside its first one."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLORS = ("#2563a8", "#d9822b", "#3c8d5a", "#8a5aa8")
BARS = {
    "answer_accuracy": "answer",
    "perception_accuracy": "perception",
    "reasoning_given_perception_accuracy": "reasoning given perception",
    "format_rate": "format",
}
HALF_WINDOW = 5
Curve = Sequence[tuple[float, float]]
"""Step and value."""


@dataclass(frozen=True)
class Panel:
    """Metrics of one stage over its steps; guide is a value worth a horizontal line."""

    stage: str
    title: str
    metrics: Mapping[str, str]
    guide: float | None = None


PANELS = (
    Panel("sft", "SFT: loss", {"loss": "cross-entropy"}),
    Panel(
        "align",
        "Alignment: discriminator",
        {"discriminator_accuracy": "accuracy, teacher over student"},
        guide=0.5,
    ),
    Panel("align", "Alignment: score gap", {"score_gap": "teacher - student"}, guide=0.0),
    Panel("rlvr", "RLVR: rollouts", {"reward": "reward", "accuracy": "accuracy"}),
)


class EvaluatedStage(Protocol):
    """A stage with its evaluation's values and its training metrics, one line a step."""

    @property
    def metrics(self) -> list[dict[str, Any]]: ...

    def value(self, metric: str) -> float | None: ...


def summary_png(stages: Mapping[str, EvaluatedStage]) -> bytes:
    """The figure as a PNG; panels of stages that are not given are left out."""
    panels = [panel for panel in PANELS if panel.stage in stages]
    figure = Figure(figsize=(max(9, 3.6 * len(panels)), 7.5), layout="constrained")
    grid = figure.add_gridspec(2, max(1, len(panels)))
    draw_accuracies(figure.add_subplot(grid[0, :]), stages)
    for column, panel in enumerate(panels):
        draw_curves(figure.add_subplot(grid[1, column]), panel, stages[panel.stage].metrics)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def lengths_png(sources: Mapping[str, Mapping[str, Sequence[int]]]) -> bytes:
    """A PNG with a histogram for each count of tokens, one line a source.

    sources: name of a source -> name of a count -> its value for each row.
    """
    names = [name for columns in sources.values() for name in columns if name.endswith("_tokens")]
    figure = Figure(figsize=(max(5, 4 * len(set(names))), 3.6), layout="constrained")
    for axes, name in zip(
        figure.subplots(1, max(1, len(set(names))), squeeze=False)[0],
        dict.fromkeys(names),
        strict=False,
    ):
        for i, (source, columns) in enumerate(sources.items()):
            if name in columns:
                color = COLORS[i % len(COLORS)]
                axes.hist(columns[name], bins=40, histtype="step", color=color, label=source)
        axes.set_title(name.replace("_", " "), loc="left", fontsize=11)
        axes.set_xlabel("tokens")
        axes.set_ylabel("rows")
        axes.legend(frameon=False, fontsize=9)
        _plain(axes)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def draw_accuracies(axes: Axes, stages: Mapping[str, EvaluatedStage]) -> None:
    """Grouped bars in percent, a group a stage; a metric that no stage has gets no bar."""
    shown = {
        metric: label
        for metric, label in BARS.items()
        if any(stage.value(metric) is not None for stage in stages.values())
    }
    width = 0.8 / max(1, len(shown))
    for i, (metric, label) in enumerate(shown.items()):
        values = [stage.value(metric) for stage in stages.values()]
        heights = [math.nan if value is None else 100 * value for value in values]
        places = [group - 0.4 + (i + 0.5) * width for group in range(len(stages))]
        bars = axes.bar(places, heights, width * 0.94, label=label, color=COLORS[i])
        labels = ["" if value is None else f"{100 * value:.0f}" for value in values]
        axes.bar_label(bars, labels, padding=2, fontsize=9)
    axes.set_xticks(range(len(stages)), list(stages))
    axes.set_ylim(0, 112)
    axes.set_yticks(range(0, 101, 20))
    axes.set_ylabel("held-out rows, %")
    axes.set_title("Held-out evaluation of each stage's export, greedy decoding", loc="left")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=len(BARS), frameon=False)
    _plain(axes)


def draw_curves(axes: Axes, panel: Panel, metrics: Sequence[Mapping[str, Any]]) -> None:
    """Each metric as it is, faint, and its running mean.

    ValueError if the stage has training metrics but not these.
    """
    for i, (metric, label) in enumerate(panel.metrics.items()):
        points = [(line["step"], line[metric]) for line in metrics if metric in line]
        if metrics and not points:
            raise ValueError(
                f"{panel.stage}/metrics.jsonl has no {metric!r}; its last line has "
                f"{', '.join(metrics[-1])}"
            )
        steps = [step for step, _ in points]
        values = [value for _, value in points]
        axes.plot(steps, values, color=COLORS[i], alpha=0.3, linewidth=1)
        axes.plot(steps, running_mean(values), color=COLORS[i], linewidth=2, label=label)
    if panel.guide is not None:
        axes.axhline(panel.guide, color="#777777", linewidth=1, linestyle=":")
    axes.set_title(panel.title, loc="left", fontsize=11)
    axes.set_xlabel("step")
    axes.legend(frameon=False, fontsize=9)
    _plain(axes)


def differences_png(
    arms: Mapping[str, Mapping[str, tuple[float | None, float | None]]],
) -> bytes:
    """A PNG with a panel for each metric, in which each arm has its difference to the first arm and
    the standard error of that as a bar, in percent; None is not drawn.

    arms: name -> name of a metric -> difference and standard error, as shares.
    """
    metrics = list(dict.fromkeys(metric for values in arms.values() for metric in values))
    figure = Figure(figsize=(5 + 2.5 * len(metrics), 1.5 + 0.3 * len(arms)), layout="constrained")
    panels = figure.subplots(1, max(1, len(metrics)), sharey=True, squeeze=False)[0]
    for axes, metric in zip(panels, metrics, strict=False):
        for place, values in enumerate(arms.values()):
            difference, error = values.get(metric, (None, None))
            if difference is not None:
                axes.errorbar(
                    100 * difference,
                    place,
                    xerr=None if error is None else 100 * error,
                    color=COLORS[0],
                    marker="o",
                    markersize=4,
                    capsize=3,
                )
        axes.axvline(0, color="#777777", linewidth=1, linestyle=":")
        axes.set_title(metric, loc="left", fontsize=11)
        axes.set_xlabel("difference, points")
        _plain(axes)
    panels[0].set_yticks(range(len(arms)), list(arms))
    panels[0].set_ylim(len(arms) - 0.5, -0.5)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def arm_curves_png(arms: Mapping[str, Mapping[str, Sequence[Curve]]]) -> bytes:
    """A PNG with a row of panels for each arm: running means of each seed, those of the first arm
    in grey behind them. Panels of a metric have one scale.

    arms: name -> name of a metric -> a curve for each seed.
    """
    first = next(iter(arms))
    metrics = list(arms[first])
    figure = Figure(figsize=(5 * len(metrics), 1.7 * len(arms) + 0.5), layout="constrained")
    rows = figure.subplots(len(arms), len(metrics), sharex=True, sharey="col", squeeze=False)
    for row, (arm, curves) in zip(rows, arms.items(), strict=True):
        for axes, metric in zip(row, metrics, strict=True):
            behind = [] if arm == first else [(c, "#999999") for c in arms[first][metric]]
            for curve, color in [*behind, *((c, COLORS[0]) for c in curves[metric])]:
                values = running_mean([value for _, value in curve])
                axes.plot([step for step, _ in curve], values, color=color, linewidth=1.2)
            axes.set_title(f"{arm}: {metric}", loc="left", fontsize=9)
            _plain(axes)
    for axes in rows[-1]:
        axes.set_xlabel("step")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()


def scaling_png(lines: Mapping[str, Curve]) -> bytes:
    """A PNG with tokens a second over the number of GPUs: of all of them, beside what the smallest
    number of a line would make of as many, and of each.

    lines: label -> (GPUs, tokens a second of each), by GPUs.
    """
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    together, each = figure.subplots(1, 2)
    for i, (label, points) in enumerate(lines.items()):
        color, gpus = COLORS[i % len(COLORS)], [count for count, _ in points]
        rates = [rate for _, rate in points]
        totals = [count * rate for count, rate in points]
        together.plot(gpus, totals, color=color, marker="o", label=label)
        linear = [count * rates[0] for count in gpus]
        together.plot(gpus, linear, color=color, linestyle=":", linewidth=1)
        each.plot(gpus, rates, color=color, marker="o", label=label)
    for axes, title in ((together, "tokens a second (dotted: linear)"), (each, "of each GPU")):
        axes.set_title(title, loc="left", fontsize=11)
        axes.set_xlabel("GPUs")
        axes.set_xscale("log", base=2)
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False, fontsize=9)
        _plain(axes)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def running_mean(values: Sequence[float]) -> list[float]:
    """Mean of each value and its neighbours, up to HALF_WINDOW on either side."""
    windows = [values[max(0, i - HALF_WINDOW) : i + HALF_WINDOW + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
