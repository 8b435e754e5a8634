"""What a run's metrics become on disk, Weights & Biases' own files read back."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto import wandb_internal_pb2

from prism_megatron.config import load as configuration
from prism_megatron.config import schema
from prism_megatron.config.schema import Wandb
from prism_megatron.training.metrics_log import MetricsLog, check_account, drop_after

OFFLINE = ("wandb.project=vision", "wandb.mode=offline", "wandb.group=night")


@pytest.fixture(autouse=True)
def _no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)


def stage(tmp_path: Path, *overrides: str) -> schema.SFT:
    file = tmp_path / "sft.yaml"
    file.write_text(
        "{data: {path: x.json}, train: {steps: 9}, batch_size: 4, optimizer: {lr: 1e-3},"
        f" model: {{path: m}}, run: {{dir: {tmp_path / 'night-3'}}}}}"
    )
    config = configuration.load("sft", [file], list(overrides))
    assert isinstance(config, schema.SFT)
    return config


def records(file: Path) -> Iterator[Any]:
    """A .wandb file: LevelDB's log format, behind a header of 7 bytes."""
    data, place, part = file.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if (left := 2**15 - place % 2**15) < 7:
            place += left
            continue
        size, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        if place + 7 + size > len(data):
            return
        part += data[place + 7 : place + 7 + size]
        place += 7 + size
        # whole, or the last part
        if kind in (1, 4):
            yield wandb_internal_pb2.Record.FromString(part)
            part = b""


def tracked(directory: Path, count: int) -> tuple[list[dict[str, float]], list[Any], list[int]]:
    """Lines, runs and exit statuses of `count` files, in the order of time."""
    deadline = time.monotonic() + 60
    while True:
        files = sorted(directory.glob("wandb/offline-run-*/*.wandb"))
        found = [record for file in files for record in records(file)]
        # another process closes a file some time after the run's end
        if sum(r.HasField("exit") for r in found) == count or time.monotonic() > deadline:
            break
        time.sleep(0.1)
    lines = [
        {i.key or i.nested_key[0]: json.loads(i.value_json) for i in r.history.item}
        for r in found
        if r.HasField("history")
    ]
    own = [{k: v for k, v in line.items() if not k.startswith("_")} for line in lines]
    runs = [r.run for r in found if r.HasField("run")]
    return own, runs, [r.exit.exit_code for r in found if r.HasField("exit")]


def test_a_run_that_goes_on_is_the_same_run(tmp_path: Path) -> None:
    config = stage(tmp_path, *OFFLINE)
    directory = config.run.dir
    drop_after(directory, 0)
    with pytest.raises(SystemExit), MetricsLog(config, 0) as log:
        for step in (1, 2, 3):
            log.write(step, {"step": step, "loss": 8.0 / step, "gap": float("nan")})
        raise SystemExit(75)
    # a checkpoint after the second
    drop_after(directory, 2)
    with MetricsLog(config, 2) as log:
        log.write(3, {"step": 3, "loss": 2.5})
        log.add(3, {"save_s": 7.0})
    wanted = [{"step": 1, "loss": 8.0}, {"step": 2, "loss": 4.0}]
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert lines == [*wanted, {"step": 3, "loss": 2.5}]
    board = EventAccumulator(str(directory / "tensorboard"))
    board.Reload()
    assert [(e.step, e.value) for e in board.Scalars("loss")] == [(1, 8.0), (2, 4.0), (3, 2.5)]
    found, runs, statuses = tracked(directory, 2)
    assert found[:2] == wanted and found[2]["step"] == 3
    assert found[3:] == [{"step": 3, "loss": 2.5}, {"step": 3, "save_s": 7.0}]
    assert statuses == [75, 0]
    assert len({run.run_id for run in runs}) == 1
    first = runs[0]
    assert (first.project, first.run_group, first.display_name) == ("vision", "night", "night-3")
    assert first.job_type == "sft"
    values = {item.key: item.value_json for item in first.config.update}
    assert json.loads(values["optimizer"])["lr"] == 1e-3


def test_a_run_that_fails_is_told_so(tmp_path: Path) -> None:
    config = stage(tmp_path, *OFFLINE, "wandb.name=mine")
    drop_after(config.run.dir, 0)
    with pytest.raises(RuntimeError), MetricsLog(config, 0) as log:
        log.write(1, {"step": 1, "loss": 3.0})
        raise RuntimeError("no more")
    found, runs, statuses = tracked(config.run.dir, 1)
    assert found == [{"step": 1, "loss": 3.0}] and statuses == [1]
    assert runs[0].display_name == "mine"


def test_without_the_section_there_is_none(tmp_path: Path) -> None:
    config = stage(tmp_path)
    drop_after(config.run.dir, 0)
    with MetricsLog(config, 0) as log:
        log.write(1, {"step": 1, "loss": 3.0})
    assert not list(config.run.dir.glob("wandb*"))


def test_an_account_is_asked_for_before_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    check_account(Wandb(project="p", mode="offline"))
    with pytest.raises(ValueError, match="finds no account .* set WANDB_API_KEY"):
        check_account(Wandb(project="p"))
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"pip install 'prism-megatron\[wandb\]'"):
        check_account(Wandb(project="p", mode="offline"))
