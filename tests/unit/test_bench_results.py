"""Results of the benchmarks beside each other, beside a baseline, and drawn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from prism_megatron import cli
from prism_megatron.bench import results, workload

H200 = Path(__file__).resolve().parents[2] / "docs" / "results" / "h200"


def show(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert cli.main(["bench", "show", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def test_what_was_measured_is_shown_beside_its_baseline(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    png = tmp_path / "scaling.png"
    runs = [H200 / "dense-bf16.json", H200 / "dense-1gpu-offload-bf16.json"]
    printed = show(capsys, *runs, "--baseline", H200 / "baseline-fsdp2.json", "--plot", png)
    [line] = [line for line in printed.splitlines() if "dense-bf16 " in line]
    cells = [cell.strip() for cell in line.strip("│").split("│")]
    # 9,001 against 2,742 tokens/s, 123.8 against 96.6 GiB
    assert cells == ["dense-bf16", "4", "2.292", "9,001", "473.4", "47.9%", "123.8", "3.28", "1.28"]
    assert png.read_bytes().startswith(b"\x89PNG")


def test_several_baselines_are_met_by_name() -> None:
    ours = {"a": {"gpus": 2, "step_s": 2.0}, "b": {"gpus": 2, "step_s": 3.0}}
    theirs = {"b": {"gpus": 2, "step_s": 6.0}, "c": {"gpus": 2, "step_s": 1.0}}
    assert results.ratios(ours["b"], theirs["b"]) == (2.0, None)
    shown = results.table(ours, theirs)
    speeds = [*shown.columns[-2].cells]
    assert speeds == ["-", "2.00"]


def test_phases_have_columns_where_there_are_any() -> None:
    with_split = {"gpus": 1, "step_s": 2.0, "split_s": {"train": 1.5, "rollout": 0.5}}
    headers = [str(column.header) for column in results.table({"x": with_split}, {}).columns]
    assert headers[-2:] == ["rollout, s", "train, s"]


def test_what_is_no_result_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "x.json"
    file.write_text(json.dumps({"gpu": 1}))
    assert cli.main(["bench", "show", str(file)]) == 2
    assert "x.json is not a result of prism-megatron bench" in capsys.readouterr().err
    file.write_text(json.dumps({"gpus": 1}))
    assert cli.main(["bench", "show", str(file), "--plot", str(tmp_path / "x.png")]) == 2
    assert "nothing to plot" in capsys.readouterr().err


def test_mfu_is_of_known_devices() -> None:
    assert workload.mfu(494.5, "NVIDIA H200") == 0.5
    assert workload.mfu(494.5, "NVIDIA H100 80GB HBM3") == 0.5
    assert workload.mfu(494.5, "x86_64") is None
