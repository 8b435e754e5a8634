"""Arms of an experiment from the command line: shared stages, a failure, a killed run, tables."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ARMS = (
    "vars: {train_rows: 32, heldout_rows: 4, sft_steps: 1, rlvr_steps: 1}",
    "common: {rlvr: [sampling.n=2, sampling.max_new_tokens=8], evaluate: [max_new_tokens=8]}",
    "arms:",
    "  narrow: {group: recipe, align: false, rlvr: [prompts_per_step=2]}",
    "  wide: {group: recipe, align: false, rlvr: [prompts_per_step=3]}",
    "  broken: {group: recipe, align: false, rlvr: [data.path=nowhere.parquet]}",
)


def start(directory: Path, arms: str, *more: str) -> subprocess.Popen[str]:
    """The experiment with one seed."""
    (directory / "arms.yaml").write_text(arms)
    folders = ["--dir", str(directory / "runs"), "--out", str(directory / "out")]
    options = [*folders, "--arms", str(directory / "arms.yaml"), "--seeds", "1"]
    return subprocess.Popen(
        [sys.executable, "-m", "tests.ablations", *options, *more],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def kill_at(process: subprocess.Popen[str], log: Path, stage: str) -> str:
    """Kill the program and what it started as soon as a stage has begun; what it had printed."""
    deadline = time.monotonic() + 300
    while not list(log.glob(f"{stage}-*.log")):
        assert process.poll() is None, process.communicate()[0][-4000:]
        assert time.monotonic() < deadline, f"{stage} did not begin within 300 s"
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    return process.communicate()[0]


@pytest.mark.timeout(900)
def test_stopped_experiment_goes_on_and_one_arm_runs_again_by_itself(tmp_path: Path) -> None:
    arms = "\n".join(ARMS)
    before = kill_at(start(tmp_path, arms), tmp_path / "runs" / "seed-1234", "convert")
    assert "tiny-model" in before

    process = start(tmp_path, arms)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 1, output[-4000:]
    assert "tiny-model" not in output and "] seed-1234 sft (3 arms)" in output
    result = json.loads((tmp_path / "out" / "ablations.json").read_text())
    narrow, wide, broken = (result["arms"][name] for name in ("narrow", "wide", "broken"))
    assert not narrow["failures"] and not wide["failures"] and not broken["runs"]
    assert broken["failures"]["1234"]["stage"] == "rlvr"
    assert "nowhere.parquet" in "".join(broken["failures"]["1234"]["log"])
    tables = (tmp_path / "out" / "ablations.md").read_text()
    assert "## FAILED: broken, seed 1234, stage rlvr" in tables
    assert "| recipe | broken | n/a | n/a | n/a | n/a | n/a | 0, 1 FAILED |" in tables
    assert (tmp_path / "out" / "ablations_rlvr.png").stat().st_size > 10_000

    folders = [arm["runs"]["1234"]["folders"] for arm in (narrow, wide)]
    assert folders[0]["sft"] == folders[1]["sft"] and folders[0]["rlvr"] != folders[1]["rlvr"]
    (tmp_path / "runs" / f"{folders[1]['rlvr']}.json").unlink()
    process = start(tmp_path, "\n".join(ARMS[:-1]))
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output[-4000:]
    lines = [line for line in output.splitlines() if line.startswith("[")]
    ran = [line.partition("] ")[2].partition(":")[0] for line in lines]
    assert ran == ["seed-1234 rlvr (wide)", "seed-1234 evaluate (wide)"]
    again = json.loads((tmp_path / "out" / "ablations.json").read_text())["arms"]
    assert again["wide"]["runs"]["1234"]["metrics"] == wide["runs"]["1234"]["metrics"]
    assert "broken" not in (tmp_path / "out" / "ablations.md").read_text()

    # what is not asked for stays as it is
    (tmp_path / "runs" / f"{folders[1]['rlvr']}.json").unlink()
    process = start(tmp_path, "\n".join(ARMS[:-1]), "--only", "narrow")
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0 and "] seed" not in output, output[-4000:]
    kept = json.loads((tmp_path / "out" / "ablations.json").read_text())["arms"]
    assert kept == again
