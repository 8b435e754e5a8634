"""The report of a finished run: summary.json, a table, summary.png and report.html.

<dir>/<stage>/eval.json + eval_rows.jsonl   (evaluate)  --+
<dir>/<stage>/metrics.jsonl                 (training)  --+--> <dir>/summary.json, summary.png
held-out parquet: the images of the rows that are shown --+    `---> report.html, one file
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from rich.console import Console
from rich.table import Table

from checkpoint_tools.files import write_atomically
from checkpoint_tools.images import decode_image
from prism_megatron import plots
from prism_megatron.config import schema
from prism_megatron.data.rows import ImageSource, read_prompts
from prism_megatron.data.sources import open_source

METRICS = {
    "answer_accuracy": "answer",
    "perception_accuracy": "perception",
    "reasoning_given_perception_accuracy": "reasoning | perception",
    "format_rate": "format",
    "finished_rate": "finished",
    "response_tokens": "tokens",
}
"""Every metric of an evaluation, with its heading, in the order of the table."""

FIRST_ROWS, CHANGED_ROWS = 12, 12
THUMBNAIL_PIXELS = 320

Metrics = list[dict[str, Any]]


@dataclass(frozen=True)
class Stage:
    """What one stage left behind."""

    name: str
    evaluation: dict[str, Any]
    rows: dict[str, dict[str, Any]]
    metrics: Metrics

    def value(self, metric: str) -> float | None:
        """The evaluation's value of a metric; None if it did not apply to the data."""
        found = self.evaluation["metrics"].get(metric)
        return None if found is None else float(found["value"])


def run(config: schema.Report) -> None:
    """Write the report into config.dir; every stage of config.stages must have been evaluated."""
    stages = [read_stage(config.dir, name) for name in config.stages]
    check_same_data(stages)
    write_atomically(config.dir / "summary.json", json.dumps(summary(stages), indent=2) + "\n")
    png = plots.summary_png({stage.name: stage for stage in stages})
    write_atomically(config.dir / "summary.png", png)
    write_atomically(config.dir / "report.html", html(stages, png))
    console = Console()
    console.print(table(stages))
    console.print(f"report: {config.dir / 'report.html'}")


def read_stage(run_dir: Path, name: str) -> Stage:
    """Read one stage's files; FileNotFoundError says which command writes a missing one."""
    folder = run_dir / name
    for file, writer in (
        ("eval.json", "prism-megatron evaluate"),
        ("eval_rows.jsonl", "prism-megatron evaluate"),
        ("metrics.jsonl", f"prism-megatron {name}"),
    ):
        if not (folder / file).exists():
            raise FileNotFoundError(
                f"{folder / file} is missing: run `{writer}` for this stage first, or leave "
                f"{name!r} out of the report's stages"
            )
    rows = read_jsonl(folder / "eval_rows.jsonl")
    return Stage(
        name=name,
        evaluation=json.loads((folder / "eval.json").read_text(encoding="utf-8")),
        rows={row["row_id"]: row for row in rows},
        metrics=by_step(read_jsonl(folder / "metrics.jsonl")),
    )


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """All lines of a JSON Lines file; ValueError names the line that is not JSON."""
    rows = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
    return rows


def by_step(metrics: Metrics) -> Metrics:
    """One line a step, in order.

    A run that was killed and resumed repeats the steps since its last checkpoint; the later line
    is the one whose weights went on.
    """
    return [line for _, line in sorted({line["step"]: line for line in metrics}.items())]


def check_same_data(stages: Sequence[Stage]) -> None:
    """ValueError unless all stages answered the same rows, without which nothing compares."""
    first = stages[0]
    for stage in stages[1:]:
        if stage.rows.keys() != first.rows.keys():
            differing = stage.rows.keys() ^ first.rows.keys()
            raise ValueError(
                f"stages {first.name!r} ({first.evaluation['data']}) and {stage.name!r} "
                f"({stage.evaluation['data']}) were evaluated on other rows: {len(differing)} of "
                f"them are in one alone, such as {min(differing)!r}; evaluate both on one file"
            )


def summary(stages: Sequence[Stage]) -> dict[str, Any]:
    """The stages' evaluations, and how each stage's training metrics began and ended."""
    return {
        "stages": {stage.name: stage.evaluation for stage in stages},
        "training": {stage.name: training_summary(stage.metrics) for stage in stages},
    }


def training_summary(metrics: Metrics) -> dict[str, Any]:
    """Steps, and every metric's mean over the first and over the last tenth of them."""
    tenth = max(1, len(metrics) // 10)
    return {
        "steps": metrics[-1]["step"] if metrics else 0,
        "first_tenth": _means(metrics[:tenth]),
        "last_tenth": _means(metrics[-tenth:]),
    }


def _means(metrics: Metrics) -> dict[str, float]:
    names = dict.fromkeys(
        name
        for line in metrics
        for name in line
        if name not in ("step", "time") and not name.startswith("time/")
    )
    columns = {name: [line[name] for line in metrics if name in line] for name in names}
    return {name: sum(values) / len(values) for name, values in columns.items()}


def display(stage: Stage, metric: str) -> str:
    """A metric as it is shown: a share in percent, tokens as a number, "n/a" if not applicable."""
    value = stage.value(metric)
    if value is None:
        return "n/a"
    return f"{value:.1f}" if metric == "response_tokens" else f"{100 * value:.1f} %"


def table(stages: Sequence[Stage]) -> Table:
    """The evaluations for the screen."""
    first = stages[0].evaluation
    result = Table(title=f"Held-out rows: {first['rows']} of {first['data']}, greedy decoding")
    result.add_column("stage")
    for heading in METRICS.values():
        result.add_column(heading, justify="right")
    for stage in stages:
        result.add_row(stage.name, *(display(stage, metric) for metric in METRICS))
    return result


def html(stages: Sequence[Stage], png: bytes) -> str:
    """The report as one file that needs no other."""
    environment = Environment(
        loader=PackageLoader("prism_megatron"), autoescape=True, trim_blocks=True
    )
    first, changed = rows_to_show(stages)
    images = read_images(Path(stages[0].evaluation["data"]), [*first, *changed])
    return environment.get_template("report.html").render(
        stages=stages,
        metrics=METRICS,
        display=display,
        plot=data_uri(png),
        groups=[
            ("The first held-out rows", "Not selected.", first),
            (
                "Rows whose verdict changed",
                "Selected: the first rows that some stages answer rightly and others wrongly.",
                changed,
            ),
        ],
        images=images,
    )


def rows_to_show(stages: Sequence[Stage]) -> tuple[list[str], list[str]]:
    """Row ids of the first rows, and of the first others whose answer changed from right or wrong.

    Both in file order, so that neither group is picked by hand.
    """
    ids = list(stages[0].rows)
    first = ids[:FIRST_ROWS]
    changed = [
        row_id
        for row_id in ids[FIRST_ROWS:]
        if len({stage.rows[row_id]["answer_correct"] for stage in stages}) > 1
    ]
    return first, changed[:CHANGED_ROWS]


def read_images(data: Path, row_ids: Sequence[str]) -> dict[str, list[str]]:
    """Row id -> its images as data URIs."""
    rows = open_source(schema.Source(path=data), read_prompts)
    index = {rows.row_id(i): i for i in range(len(rows))}
    return {
        row_id: [thumbnail(image) for image in rows[index[row_id]].images] for row_id in row_ids
    }


def thumbnail(source: ImageSource) -> str:
    """An image as a PNG data URI, at most THUMBNAIL_PIXELS on a side."""
    image = decode_image(source.read())
    image.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return data_uri(buffer.getvalue())


def data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
