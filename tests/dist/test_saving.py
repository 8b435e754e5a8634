"""Checkpoints of a run: written beside training, kept or removed, on disks that refuse them."""

from __future__ import annotations

import json
import os
import resource
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist
from megatron.core.dist_checkpointing.validation import validate_sharding_integrity

from checkpoint_tools.megatron_directory import Saving
from prism_megatron.config import schema
from prism_megatron.data import digit_sums
from prism_megatron.pipelines import sft, tiny_model
from tests.dist.ranks import Ranks

Worlds = Callable[[int], Ranks]
SYSTEM_PROMPT = Path(__file__).parents[2] / "configs/quickstart/system_prompt.txt"
LIMITS = {"max_prompt_tokens": 512, "max_response_tokens": 512}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("saving")
    digit_sums.build(schema.DigitSums(out=out, train_rows=24, heldout_rows=2))
    tiny_model.run(
        schema.TinyModel(out=out / "tiny", data=out / "sft.json", system_prompt=SYSTEM_PROMPT)
    )
    return out


def _train(root: Path, out: Path, train: dict[str, Any]) -> None:
    config = schema.SFT.model_validate(
        {
            "run": {"dir": out},
            "data": {"path": root / "sft.json", "num_workers": 0} | LIMITS,
            # all state of a shard is on one rank, which need not gather it
            "model": {"path": root / "tiny", "parallel": {"tensor": dist.get_world_size()}},
            "optimizer": {"lr": 1e-3},
            "batch_size": 4,
            "train": {"steps": 6, "save_every": 2, "micro_batch_tokens": 1024} | train,
        }
    )
    sft.run(config)


def _checks(root: Path, out: Path) -> tuple[int, list[str]]:
    """How often a run had all ranks told of all shards, and its checkpoints."""
    name = "megatron.core.dist_checkpointing.state_dict_utils.validate_sharding_integrity"
    with mock.patch(name, side_effect=validate_sharding_integrity) as check:
        _train(root, out, {"keep_checkpoints": 3})
    return check.call_count, _names(out)


def test_shards_are_checked_against_each_other_once_a_run(
    ranks: Worlds, root: Path, tmp_path: Path
) -> None:
    names = ["step_000002", "step_000004", "step_000006"]
    assert ranks(2).run(_checks, root, tmp_path / "run") == [(1, names)] * 2


def _lines(out: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k in ("step", "loss", "grad_norm")} for line in lines]


def _names(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").iterdir())


def _slowly(root: Path, out: Path) -> list[list[str]]:
    """Train with writers that wait until two more steps are taken; the checkpoints that there are
    before each step."""
    go_on, seen = threading.Event(), []
    write, step = Saving._write, sft.step

    def waiting(saving: Saving, buckets: list[Any]) -> None:
        assert go_on.wait(300)
        write(saving, buckets)

    def counted(*args: Any) -> dict[str, float]:
        seen.append(_names(out) if (out / "checkpoints").exists() else [])
        if len(seen) == 4:
            go_on.set()
        return step(*args)

    with mock.patch.object(Saving, "_write", waiting), mock.patch.object(sft, "step", counted):
        _train(root, out, {"async_save": True, "keep_checkpoints": 9})
    return seen


def test_what_is_written_beside_training_is_the_state_of_its_step(
    ranks: Worlds, root: Path, tmp_path: Path
) -> None:
    whole, beside = tmp_path / "whole", tmp_path / "beside"
    ranks(2).run(_train, root, whole, {})
    seen = ranks(2).run(_slowly, root, beside)[0]
    # two steps were taken before anything of the second step's checkpoint was written
    assert seen[:4] == [[], [], [".step_000002.partial"], [".step_000002.partial"]]
    assert _names(beside) == ["step_000002", "step_000004", "step_000006"]
    assert _lines(beside) == _lines(whole)
    times = [json.loads(line) for line in (beside / "metrics.jsonl").read_text().splitlines()]
    stalls = {line["step"]: line["time/save"] for line in times if "time/save" in line}
    assert {3, 5} <= set(stalls) and all(0 < stall for stall in stalls.values())
    assert any(line.get("save_s", 0) > stalls[3] for line in times)
    shutil.rmtree(beside / "checkpoints/step_000006")
    # as a killed run leaves what it was removing
    os.replace(beside / "checkpoints/step_000004", beside / "checkpoints/.step_000004.removed")
    ranks(2).run(_train, root, beside, {"async_save": True})
    assert _lines(beside) == _lines(whole)
    assert _names(beside) == ["step_000006"]


def _removing(root: Path, out: Path) -> list[list[str]]:
    """Train with a slow removal of checkpoints; those that there are before each step."""
    seen, go_on = [], threading.Event()
    remove, step = shutil.rmtree, sft.step

    def waiting(path: Path, *args: Any, **kwargs: Any) -> None:
        if path.name.endswith(".removed"):
            assert go_on.wait(300)
        remove(path, *args, **kwargs)

    def counted(*args: Any) -> dict[str, float]:
        seen.append(_names(out) if (out / "checkpoints").exists() else [])
        if len(seen) == 6:
            go_on.set()
        return step(*args)

    with mock.patch.object(shutil, "rmtree", waiting), mock.patch.object(sft, "step", counted):
        _train(root, out, {})
    return seen


def test_training_does_not_wait_until_an_older_checkpoint_is_gone(
    ranks: Worlds, root: Path, tmp_path: Path
) -> None:
    seen = ranks(2).run(_removing, root, tmp_path)[0]
    assert seen[4] == seen[5] == [".step_000002.removed", "step_000004"]
    assert _names(tmp_path) == ["step_000006"]


def _refused(root: Path, out: Path, is_async: bool, reason: str) -> str:
    """Two steps and their checkpoint, then no room for that of the next two."""
    _train(root, out, {"stop_at": 2})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    usage = shutil.disk_usage(out)
    free = 10**6 if reason == "free" else usage.free
    patch = mock.patch.object(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    if reason == "write" and dist.get_rank() == 0:
        # files end here, as on a disk that fills up while another writes too
        resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, before[1]))
    try:
        with patch:
            _train(root, out, {"async_save": is_async})
    except ValueError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    return ""


@pytest.mark.parametrize("is_async", [False, True])
def test_a_full_disk_ends_the_run_and_leaves_what_was_there(
    ranks: Worlds, root: Path, tmp_path: Path, is_async: bool
) -> None:
    for reason, words in [
        ("free", "GiB and its disk has 0.000931 GiB free"),
        ("write", "GiB left when that failed"),
    ]:
        out = tmp_path / reason
        for message in ranks(2).run(_refused, root, out, is_async, reason):
            assert f"{out}/checkpoints/.step_000004.partial/model" in message
            assert words in message and "make room or choose another folder" in message
        assert "step_000002" in _names(out) and "step_000004" not in _names(out)
        # with room it goes on, and clears up
        ranks(2).run(_train, root, out, {})
        assert [line["step"] for line in _lines(out)] == [1, 2, 3, 4, 5, 6]
        assert _names(out) == ["step_000006"]


def test_the_best_stays_beside_the_last(ranks: Worlds, root: Path, tmp_path: Path) -> None:
    best = {"metric": "loss", "mode": "max"}
    ranks(1).run(_train, root, tmp_path, {"save_every": 1, "keep_best": best})
    losses = [line["loss"] for line in _lines(tmp_path)]
    highest = 1 + losses.index(max(losses))
    assert highest < 6
    assert _names(tmp_path) == [f"step_{highest:06d}", "step_000006"]
