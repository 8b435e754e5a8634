from __future__ import annotations

import json
from pathlib import Path

import pytest

from prism_megatron.compare import METRICS, STAGES, compare, table


def finished(folder: Path, accuracy: dict[str, float]) -> Path:
    for stage in STAGES:
        (folder / stage).mkdir(parents=True)
        metrics = {name: {"value": accuracy[stage], "count": 50} for name in METRICS}
        (folder / stage / "eval.json").write_text(json.dumps({"rows": 50, "metrics": metrics}))
    return folder


def test_means_and_deviations_over_seeds(tmp_path: Path) -> None:
    folders = [
        finished(tmp_path / "a", {"sft": 0.5, "align": 0.6, "rlvr_direct": 0.7, "rlvr": 0.8}),
        finished(tmp_path / "b", {"sft": 0.6, "align": 0.6, "rlvr_direct": 0.9, "rlvr": 0.8}),
    ]
    result = compare(folders)
    spread = result["summary"]["rlvr_direct"]["answer_accuracy"]
    assert spread["mean"] == pytest.approx(0.8)
    assert spread["std"] == pytest.approx(0.1414, abs=1e-4)
    assert "| SFT, RLVR | 80.0 ± 14.1 |" in table(result)
    assert "| 70.0, 90.0 |" in table(result)


def test_one_seed_claims_no_deviation(tmp_path: Path) -> None:
    folder = finished(tmp_path / "a", dict.fromkeys(STAGES, 0.25))
    assert "±" not in table(compare([folder]))


def test_unfinished_folder_is_an_error(tmp_path: Path) -> None:
    folder = finished(tmp_path / "a", dict.fromkeys(STAGES, 0.25))
    (folder / "rlvr" / "eval.json").unlink()
    with pytest.raises(FileNotFoundError):
        compare([folder])
