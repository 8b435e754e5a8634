"""The report of a run folder: what it sums up, what it refuses, what the page shows."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from prism_megatron import report
from prism_megatron.config import schema
from prism_megatron.data import digit_sums
from prism_megatron.data.rows import ImageSource, read_prompts
from prism_megatron.plots import running_mean

NUM_ROWS = 30
LINES: dict[str, dict[str, float]] = {
    "sft": {"loss": 3.0},
    "align": {"discriminator_accuracy": 0.9, "score_gap": 2.0},
    "rlvr": {"reward": 0.5, "accuracy": 0.4},
}
# Each stage answers so many of the first rows rightly, and the others wrongly.
RIGHT_ROWS = {"sft": 15, "align": 18, "rlvr": 24}


def write_jsonl(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def eval_row(row_id: str, truth: str, right: bool) -> dict[str, Any]:
    answer = truth if right else "x<script>alert(1)</script>"
    return {
        "row_id": row_id,
        "question": "Add the two digits.",
        "truth": truth,
        "response": f"<caption>1 2</caption><think>1+2=3</think><answer>{answer}</answer>",
        "response_tokens": 17,
        "finished": right,
        "answer_correct": right,
        "format_correct": True,
        "perception_correct": right,
        "reasoning_correct": None,
    }


def write_stage(folder: Path, name: str, data: Path) -> None:
    rows = read_prompts(data)
    folder.mkdir()
    write_jsonl(
        folder / "eval_rows.jsonl",
        [
            eval_row(rows[i].row_id, rows[i].ground_truth, i < RIGHT_ROWS[name])
            for i in range(NUM_ROWS)
        ],
    )
    evaluation = {
        "stage": name,
        "data": str(data),
        "rows": NUM_ROWS,
        "seed": 11,
        "git_commit": "abc123",
        "versions": {"torch": "2.11.0"},
        "metrics": {
            "answer_accuracy": {"value": RIGHT_ROWS[name] / NUM_ROWS, "count": NUM_ROWS},
            "response_tokens": {"value": 17.0, "count": NUM_ROWS},
        },
    }
    (folder / "eval.json").write_text(json.dumps(evaluation))
    lines = [
        {"step": step, "time": 1.5 * step}
        | {key: value - 0.01 * step for key, value in LINES[name].items()}
        for step in range(1, 41)
    ]
    write_jsonl(folder / "metrics.jsonl", lines)


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("run")
    settings = schema.DigitSums(out=root / "data", train_rows=4, heldout_rows=NUM_ROWS)
    digit_sums.build(settings)
    for name in LINES:
        write_stage(root / name, name, root / "data" / "heldout.parquet")
    report.run(schema.Report(dir=root))
    return root


@pytest.fixture
def run_dir(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of the run, without its report, that a test may spoil."""
    for name in LINES:
        shutil.copytree(finished_run / name, tmp_path / name)
    return tmp_path


def read_stages(run_dir: Path) -> list[report.Stage]:
    return [report.read_stage(run_dir, name) for name in LINES]


def test_the_summary_holds_every_stage_with_counts_and_provenance(finished_run: Path) -> None:
    summary = json.loads((finished_run / "summary.json").read_text())
    assert list(summary["stages"]) == ["sft", "align", "rlvr"]
    rlvr = summary["stages"]["rlvr"]
    assert rlvr["metrics"]["answer_accuracy"] == {"value": 0.8, "count": NUM_ROWS}
    assert (rlvr["seed"], rlvr["git_commit"]) == (11, "abc123")
    assert rlvr["versions"] == {"torch": "2.11.0"}


def test_the_summary_tells_how_training_began_and_ended(finished_run: Path) -> None:
    training = json.loads((finished_run / "summary.json").read_text())["training"]["align"]
    assert training["steps"] == 40
    assert training["first_tenth"]["score_gap"] == pytest.approx(2.0 - 0.025)
    assert training["last_tenth"]["score_gap"] == pytest.approx(2.0 - 0.385)
    assert "time" not in training["first_tenth"]


def test_the_figure_is_a_png_of_a_readable_size(finished_run: Path) -> None:
    image = Image.open(finished_run / "summary.png")
    assert image.format == "PNG"
    assert image.width > 1000
    colors = image.convert("RGB").getcolors(maxcolors=2**24)
    assert colors is not None
    assert len(colors) > 50


def test_the_page_needs_no_other_file(finished_run: Path) -> None:
    page = (finished_run / "report.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(sources) == 1 + 12 + 9
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    plot = base64.b64decode(sources[0].split(",")[1])
    assert plot == (finished_run / "summary.png").read_bytes()


def test_the_page_shows_each_rows_own_image(finished_run: Path) -> None:
    page = (finished_run / "report.html").read_text()
    first_row = read_prompts(finished_run / "data" / "heldout.parquet")[0]
    expected = Image.open(io.BytesIO(first_row.images[0].read())).convert("RGB")
    shown = re.findall(r'src="data:image/png;base64,([^"]*)"', page)[1]
    assert Image.open(io.BytesIO(base64.b64decode(shown))).tobytes() == expected.tobytes()


def test_a_drawing_on_transparent_ground_is_shown_on_white() -> None:
    drawing = Image.new("RGBA", (640, 320), (0, 0, 0, 0))
    drawing.paste("black", (0, 0, 320, 320))
    buffer = io.BytesIO()
    drawing.save(buffer, "PNG")
    uri = report.thumbnail(ImageSource(data=buffer.getvalue()))
    shown = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
    assert shown.size == (320, 160)
    assert (shown.getpixel((40, 80)), shown.getpixel((280, 80))) == ((0, 0, 0), (255, 255, 255))


def test_what_a_model_wrote_is_text_and_never_markup(finished_run: Path) -> None:
    page = (finished_run / "report.html").read_text()
    assert "<script" not in page
    assert "x&lt;script&gt;alert(1)" in page
    assert "<caption>" not in page


def test_the_page_counts_right_and_wrong_answers_side_by_side(finished_run: Path) -> None:
    page = (finished_run / "report.html").read_text()
    # 12 first rows, right at every stage; of the rows 12 to 29, 15 to 23 change, 9 in all...
    assert page.count('<section class="row">') == 12 + 9
    # ... of which align answers 3 more rightly than sft, and rlvr all.
    assert page.count("✓ right") == 3 * 12 + 3 + 9
    assert page.count("✗ wrong") == 9 + 6


def test_shown_rows_are_the_first_and_those_whose_verdict_changed(run_dir: Path) -> None:
    first, changed = report.rows_to_show(read_stages(run_dir))
    assert first == [f"heldout:{i}" for i in range(12)]
    assert changed == [f"heldout:{i}" for i in range(15, 24)]


def test_a_metric_that_does_not_apply_says_so(run_dir: Path) -> None:
    stage = read_stages(run_dir)[0]
    assert report.display(stage, "answer_accuracy") == "50.0 %"
    assert report.display(stage, "response_tokens") == "17.0"
    assert report.display(stage, "perception_accuracy") == "n/a"


def test_the_table_has_a_line_a_stage(run_dir: Path) -> None:
    console = Console(record=True, width=120, file=io.StringIO())
    console.print(report.table(read_stages(run_dir)))
    text = console.export_text()
    for name, percent in (("sft", "50.0 %"), ("align", "60.0 %"), ("rlvr", "80.0 %")):
        assert re.search(rf"{name}\D+{re.escape(percent)}", text)


@pytest.mark.parametrize(
    ("file", "command"),
    [
        ("eval.json", "prism-megatron evaluate"),
        ("eval_rows.jsonl", "prism-megatron evaluate"),
        ("metrics.jsonl", "prism-megatron align"),
    ],
)
def test_a_missing_file_names_the_command_that_writes_it(
    run_dir: Path, file: str, command: str
) -> None:
    (run_dir / "align" / file).unlink()
    with pytest.raises(FileNotFoundError, match=f"align/{file} is missing: run `{command}`"):
        report.run(schema.Report(dir=run_dir))
    assert not (run_dir / "summary.json").exists()


def test_a_stage_that_is_not_listed_may_be_missing(run_dir: Path) -> None:
    shutil.rmtree(run_dir / "align")
    report.run(schema.Report(dir=run_dir, stages=("sft", "rlvr")))
    assert list(json.loads((run_dir / "summary.json").read_text())["stages"]) == ["sft", "rlvr"]


def test_stages_that_answered_other_rows_are_not_compared(run_dir: Path) -> None:
    path = run_dir / "rlvr" / "eval_rows.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(ValueError, match=r"'sft'.*'rlvr'.*1 of them.*heldout:29"):
        report.run(schema.Report(dir=run_dir))


def test_a_stage_without_the_metrics_of_its_plot_is_refused(run_dir: Path) -> None:
    write_jsonl(run_dir / "align" / "metrics.jsonl", [{"step": 1, "score_gap": 1.0}])
    with pytest.raises(ValueError, match=r"align/metrics.jsonl has no 'discriminator_accuracy'"):
        report.run(schema.Report(dir=run_dir))


def test_a_line_that_is_not_json_is_named(run_dir: Path) -> None:
    with (run_dir / "sft" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4')
    with pytest.raises(ValueError, match=r"sft/metrics.jsonl, line 41 is not JSON"):
        report.run(schema.Report(dir=run_dir))


def test_separators_that_a_model_may_write_do_not_end_a_line(tmp_path: Path) -> None:
    rows = [{"response": "a\u2028b\x85c\x0bd\r"}, {"response": "e"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    assert report.read_jsonl(path) == rows


def test_a_resumed_run_counts_each_step_once_as_it_went_on() -> None:
    lines = [{"step": step, "loss": float(step)} for step in (1, 2, 3)]
    resumed = [{"step": step, "loss": 10.0 * step} for step in (2, 3, 4)]
    assert report.by_step([*lines, *resumed]) == [lines[0], *resumed]


def test_the_running_mean_is_centred_and_shrinks_at_the_ends() -> None:
    values = [float(x * x) for x in range(20)]
    means = running_mean(values)
    assert means[0] == sum(values[:6]) / 6
    assert means[10] == sum(values[5:16]) / 11
    assert means[19] == sum(values[14:]) / 6
