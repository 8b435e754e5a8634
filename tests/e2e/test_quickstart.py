"""The quickstart as a newcomer runs it, at reduced steps: killed once, started again, looked at."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import Qwen3VLForConditionalGeneration, Qwen3VLMoeForConditionalGeneration

# the first test waits for the whole run
pytestmark = pytest.mark.timeout(1800)

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("sft", "align", "rlvr")
METRICS = (
    "answer_accuracy",
    "perception_accuracy",
    "reasoning_given_perception_accuracy",
    "format_rate",
    "response_tokens",
)


def quickstart(directory: Path) -> subprocess.Popen[str]:
    command = ["bash", "launch/quickstart.sh", "--smoke", "--seed", "5", "--dir", str(directory)]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def kill_after_first_checkpoint(process: subprocess.Popen[str], stage: Path) -> None:
    """Kill everything that the quickstart started, as a machine that goes away would."""
    deadline = time.monotonic() + 300
    while not list(stage.glob("checkpoints/step_*")):
        assert process.poll() is None, process.communicate()[0][-4000:]
        assert time.monotonic() < deadline, "no checkpoint within 300 s"
        time.sleep(0.1)
    # torchrun's ranks are in sessions of their own
    shell = psutil.Process(process.pid)
    for each in (shell, *shell.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            each.kill()
    process.communicate(timeout=60)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a finished run that had been killed during SFT, and what it printed."""
    directory = tmp_path_factory.mktemp("quickstart") / "run"
    kill_after_first_checkpoint(quickstart(directory), directory / "sft")
    process = quickstart(directory)
    output, _ = process.communicate(timeout=1500)
    assert process.returncode == 0, output[-6000:]
    return directory, output


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_killed_run_goes_on_after_its_checkpoint(run: tuple[Path, str]) -> None:
    directory, output = run
    steps = [entry["step"] for entry in lines(directory / "sft" / "metrics.jsonl")]
    assert steps == list(range(1, 61)), "every step is logged once"
    assert "digit-sums: finished before" in output
    assert "sft step 3/60 " not in output, "SFT began anew instead of going on"


def test_summary_has_what_a_reader_needs(run: tuple[Path, str]) -> None:
    summary = json.loads((run[0] / "summary.json").read_text())
    text = json.dumps(summary)
    for stage in STAGES:
        result = json.loads((run[0] / stage / "eval.json").read_text())
        assert result["seed"] == 5
        assert result["versions"]["megatron-core"] and "git_commit" in result
        for metric in METRICS:
            assert result["metrics"][metric]["count"] >= 0
        assert f'"{stage}"' in text
    for metric in METRICS:
        assert metric in text
    assert (run[0] / "summary.png").stat().st_size > 10_000
    assert "data:image/png" in (run[0] / "report.html").read_text()


@pytest.mark.parametrize("stage", STAGES)
def test_exports_load_in_transformers(run: tuple[Path, str], stage: str) -> None:
    _, info = Qwen3VLForConditionalGeneration.from_pretrained(
        run[0] / stage / "hf", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert not info["mismatched_keys"]


def test_discriminator_is_a_mixture_of_experts(run: tuple[Path, str]) -> None:
    model, info = Qwen3VLMoeForConditionalGeneration.from_pretrained(
        run[0] / "warmup" / "hf", output_loading_info=True
    )
    # the score head comes with it, the language head is what a discriminator does not have
    assert set(info["unexpected_keys"]) == {"v_head.1.weight"}
    assert set(info["missing_keys"]) == {"lm_head.weight"}
    assert model.config.text_config.num_experts == 4


@pytest.mark.parametrize("stage", ["align", "rlvr"])
def test_engine_samples_with_the_trainers_weights(run: tuple[Path, str], stage: str) -> None:
    for entry in lines(run[0] / stage / "metrics.jsonl"):
        assert entry["weight_version"] == entry["step"]
        assert entry["logprob_mismatch"] < 1e-4


def test_every_stage_moves_the_weights(run: tuple[Path, str]) -> None:
    models = [
        Qwen3VLForConditionalGeneration.from_pretrained(path).state_dict()
        for path in (run[0] / "tiny", *(run[0] / stage / "hf" for stage in STAGES))
    ]
    for before, after in pairwise(models):
        still = [name for name in before if torch.equal(before[name], after[name])]
        assert not still, f"not trained: {still}"


def test_discriminator_is_trained_in_warmup_and_alignment(run: tuple[Path, str]) -> None:
    for entry in lines(run[0] / "warmup" / "metrics.jsonl"):
        assert entry["grad_norm"] > 0 and entry["aux_loss"] > 1.9
    for entry in lines(run[0] / "align" / "metrics.jsonl"):
        assert entry["discriminator_grad_norm"] > 0 and entry["policy_grad_norm"] > 0


def stage(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A stage alone, in one process."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-m", "prism_megatron", name, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def sft(run_dir: Path, data: Path, out: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    return stage(
        "sft",
        "--config",
        "configs/quickstart/sft.yaml",
        f"vars.dir={run_dir}",
        f"data.path={data}",
        f"run.dir={out}",
        "model.parallel.tensor=1",
        "vars.sft_steps=6",
        *overrides,
    )


@pytest.fixture(scope="module")
def damaged(run: tuple[Path, str]) -> Path:
    """The SFT file with three of its rows made unusable."""
    data = run[0] / "data"
    rows = json.loads((data / "sft.json").read_text())
    rows[0]["images"] = ["images/not-there.png"]
    (data / "images" / "broken.png").write_bytes(b"this is no image")
    rows[1]["images"] = ["images/broken.png"]
    rows[2]["messages"][0]["content"] += " and again" * 400
    file = data / "damaged.json"
    file.write_text(json.dumps(rows))
    return file


def test_bad_rows_are_quarantined_and_reported(
    run: tuple[Path, str], damaged: Path, tmp_path: Path
) -> None:
    done = sft(run[0], damaged, tmp_path / "out", "data.max_bad_share=0.1")
    assert done.returncode == 0, done.stderr[-3000:]
    reasons = {entry["reason"].split(":")[0] for entry in lines(tmp_path / "out/quarantine.jsonl")}
    assert len(reasons) == 3, reasons
    assert "3 rows quarantined" in done.stdout


def test_too_many_bad_rows_stop_the_run(
    run: tuple[Path, str], damaged: Path, tmp_path: Path
) -> None:
    done = sft(run[0], damaged, tmp_path / "out", "data.max_bad_share=0.005")
    assert done.returncode == 2
    assert "max_bad_share" in done.stderr and "Traceback" not in done.stderr


def test_impossible_layout_is_refused_before_training(
    run: tuple[Path, str], tmp_path: Path
) -> None:
    done = sft(run[0], run[0] / "data/sft.json", tmp_path / "out", "model.parallel.tensor=2")
    assert done.returncode == 2
    assert "tensor 2" in done.stderr and "world size 1" in done.stderr
