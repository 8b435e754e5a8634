"""filter-difficulty with engines in processes of their own, which are killed, and so is the run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import yaml

from checkpoint_tools import tiny_qwen3vl
from prism_megatron.config import schema
from prism_megatron.data import digit_sums
from tests import mock_sglang
from tests.processes import started_by

ROOT = Path(__file__).resolve().parents[2]
# engines take one at a time, so that 40 are two batches
PROMPTS, RESPONSES, TOKENS = 40, 3, 150
ENGINES: dict[str, dict[str, Any]] = {
    "local": {"engines": 2},
    "sglang": {"engines": 2, "gpus": [0, 1]},
}
PROCESS = {"local": "ray::AsyncLocalEngine", "sglang": "tests.mock_sglang"}
"""What the command line of an engine's process holds."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data/, model/, and a "python" that starts the mock in the place of SGLang."""
    out = tmp_path_factory.mktemp("sampled")
    digit_sums.build(schema.DigitSums(out=out / "data", train_rows=PROMPTS, heldout_rows=2))
    texts = [digit_sums.demonstration("sum", (a, b)) for a in range(10) for b in range(10)]
    tiny_qwen3vl.create(out / "model", texts, "Answer in sections.", vocab_size=320, seed=3)
    mock_sglang.python(out / "python")
    return out


def command(root: Path, out: Path, kind: str) -> list[str]:
    """A run into `out`."""
    rollout: dict[str, Any] = {"kind": kind}
    if kind != "embedded":
        rollout |= ENGINES[kind] | {"max_outstanding_tokens": 700, "health_interval": 1}
        rollout |= {"max_attempts": 10}
    if kind == "sglang":
        rollout["python"] = str(root / "python")
    out.mkdir(exist_ok=True)
    values = {
        "run": {"dir": str(out / "run")},
        "data": {"path": str(root / "data/prompts.parquet"), "max_prompt_tokens": 100},
        "model": str(root / "model"),
        "sampling": {"n": RESPONSES, "max_new_tokens": TOKENS},
        "rollout": rollout,
        # a random model is never right
        "low": 0.0,
        "out": str(out / "kept.parquet"),
    }
    (out / "config.yaml").write_text(yaml.safe_dump(values))
    stage = ["-m", "prism_megatron", "filter-difficulty", "--config", str(out / "config.yaml")]
    return [sys.executable, *stage]


def environment() -> dict[str, str]:
    return os.environ | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "HF_HUB_OFFLINE": "1",
    }


def finish(root: Path, out: Path, kind: str) -> str:
    """What a run that comes to its end printed."""
    done = subprocess.run(
        command(root, out, kind), cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def lines(out: Path) -> list[str]:
    """The responses so far, a line a prompt."""
    file = out / "run" / "responses.jsonl"
    return file.read_text().splitlines()[1:] if file.exists() else []


def wait(job: subprocess.Popen[bytes], out: Path, count: int) -> None:
    """Until so many prompts have responses."""
    while len(lines(out)) < count:
        assert job.poll() is None, (out / "log").read_text()[-3000:]
        time.sleep(0.02)


@pytest.mark.parametrize("kind", ENGINES)
def test_what_is_killed_is_sampled_once_and_gives_the_same_file(
    root: Path, tmp_path: Path, kind: str
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    printed = finish(root, whole, "embedded" if kind == "local" else kind)
    assert f"run prompt {PROMPTS}/{PROMPTS}" in printed and "0 s left" in printed

    killed.mkdir()
    with (killed / "log").open("wb") as log:
        job = subprocess.Popen(
            command(root, killed, kind), cwd=ROOT, env=environment(), stdout=log, stderr=log
        )
    try:
        wait(job, killed, 5)
        started_by(job.pid, lambda p: PROCESS[kind] in " ".join(p.cmdline()))[0].kill()
        wait(job, killed, 12)
    finally:
        started = psutil.Process(job.pid).children(recursive=True)
        job.kill()
        job.wait()
        psutil.wait_procs(started, 20)
        for process in started:
            if process.is_running():
                process.kill()
    before = lines(killed)
    assert 12 <= len(before) < PROMPTS, "the run ended before it was killed"

    finish(root, killed, kind)
    after = lines(killed)
    assert after[: len(before)] == before
    rows = Counter(json.loads(line)["row"] for line in after)
    assert rows == dict.fromkeys(range(PROMPTS), 1)
    assert sorted(after) == sorted(lines(whole))
    assert pq.read_table(killed / "kept.parquet") == pq.read_table(whole / "kept.parquet")
