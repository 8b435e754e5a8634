"""Results beside each other and beside a baseline: a table, and how they scale with GPUs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from prism_megatron import plots

Result = dict[str, Any]
SPLIT = ("rollout", "score", "log_probs", "train", "sync", "save", "idle")


def read(paths: Sequence[Path]) -> dict[str, Result]:
    """Results by the names of their files; ValueError for what is none."""
    found = {}
    for path in paths:
        result = json.loads(path.read_text())
        if not isinstance(result, dict) or "gpus" not in result:
            raise ValueError(f"{path} is not a result of prism-megatron bench: it names no gpus")
        found[path.stem] = result
    return found


def table(results: dict[str, Result], baseline: dict[str, Result]) -> Table:
    """A row a result. A baseline of the same name or, if there is but one, that one is compared."""
    shown = Table()
    shown.add_column("run")
    columns = ("GPUs", "step, s", "tokens/s/GPU", "TFLOP/s/GPU", "MFU", "peak GiB")
    for name in columns:
        shown.add_column(name, justify="right")
    phases = [
        phase for phase in SPLIT if any(phase in r.get("split_s", {}) for r in results.values())
    ]
    for phase in phases:
        shown.add_column(f"{phase}, s", justify="right")
    if baseline:
        shown.add_column("speed against baseline", justify="right")
        shown.add_column("memory", justify="right")
    for name, result in results.items():
        split = result.get("split_s", {})
        cells = [
            str(result["gpus"]),
            _cell(result.get("step_s", result.get("batch_s")), ".3f"),
            _cell(result.get("tokens_per_s_per_gpu"), ",.0f"),
            _cell(result.get("tflops_per_gpu"), ".1f"),
            _cell(result.get("mfu"), ".1%"),
            _cell(result.get("peak_memory_gib"), ".1f"),
            *(_cell(split.get(phase), ".3f") for phase in phases),
        ]
        if baseline:
            other = baseline.get(name)
            if other is None and len(baseline) == 1:
                [other] = baseline.values()
            speed, memory = ratios(result, other or {})
            cells += [_cell(speed, ".2f"), _cell(memory, ".2f")]
        shown.add_row(name, *cells)
    return shown


def ratios(result: Result, baseline: Result) -> tuple[float | None, float | None]:
    """Speed (above 1 is faster), by tokens a second or by seconds, and peak memory."""
    speed = _ratio(result, baseline, "tokens_per_s_per_gpu")
    if speed is None and (slower := _ratio(result, baseline, "step_s")):
        speed = 1 / slower
    return speed, _ratio(result, baseline, "peak_memory_gib")


def plot(results: dict[str, Result]) -> bytes:
    """PNG: tokens a second over GPUs, all of them and each, a line a model and precision."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for result in results.values():
        if (rate := result.get("tokens_per_s_per_gpu")) is None:
            continue
        label = result.get("model") or result.get("stage") or result.get("kind", "")
        if result.get("fp8", "off") != "off":
            label += f" FP8 {result['fp8']}"
        lines.setdefault(label, []).append((result["gpus"], rate))
    if not lines:
        raise ValueError(
            "none of the results has tokens_per_s_per_gpu, so there is nothing to plot"
        )
    return plots.scaling_png({label: sorted(points) for label, points in lines.items()})


def _ratio(result: Result, baseline: Result, name: str) -> float | None:
    ours, theirs = result.get(name), baseline.get(name)
    return ours / theirs if ours and theirs else None


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
