"""kill -9 at random points of SFT, alignment and RLVR: nothing half-written counts, and the run
that was started again logs what the undisturbed one does, to the last bit.

With engines of their own (tests/e2e/test_kills.py) the launcher starts the run again.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from checkpoint_tools.upcycle import upcycle
from prism_megatron.config import schema
from prism_megatron.data import digit_sums
from prism_megatron.pipelines import alignment, rlvr, sft, tiny_model
from tests.dist.ranks import Ranks

SYSTEM_PROMPT = Path(__file__).parents[2] / "configs/quickstart/system_prompt.txt"
CLOCKS = ("time", "sync_s", "save_s", "time/")
LIMITS = {"max_prompt_tokens": 512, "max_response_tokens": 512}
TRAIN = {"save_every": 2, "keep_checkpoints": 2, "micro_batch_tokens": 1024}
# of texts without format nothing is rewarded, but the entropy has a gradient, so that every
# response depends on the updates before it
SAMPLED = {
    "prompts_per_step": 2,
    "sampling": {"n": 2, "max_new_tokens": 10},
    "entropy_coef": 0.1,
    "policy_optimizer": {"lr": 1e-3},
}
STAGES: dict[str, Any] = {
    "sft": {
        "data": {"path": "data/sft.json"} | LIMITS,
        "model": {"path": "tiny", "parallel": {"tensor": 2}},
        "optimizer": {"lr": 1e-3, "warmup_steps": 9},
        "batch_size": 4,
        "train": TRAIN | {"steps": 30, "async_save": True},
    },
    "align": SAMPLED
    | {
        "data": {"path": "data/prompts.parquet", "system_prompt": SYSTEM_PROMPT} | LIMITS,
        "policy": {"path": "tiny", "parallel": {"tensor": 2}},
        "discriminator": {"path": "judge", "parallel": {"expert": 2}},
        "discriminator_optimizer": {"lr": 1e-3},
        # rings after steps that come before and after a kill
        "alarms": {"load_entropy_below": 0.999, "patience": 7},
        # invalid responses train the discriminator, too
        "fallback_loss": "reference",
        "regularised_scores": "reference",
        "train": TRAIN | {"steps": 12},
    },
    "rlvr": SAMPLED
    | {
        "data": {"path": "data/prompts.parquet", "system_prompt": SYSTEM_PROMPT} | LIMITS,
        "policy": {"path": "tiny"},
        "kl_coef": 0.01,
        "train": TRAIN | {"steps": 12, "async_save": True},
    },
}
KILLS = {"sft": 8, "align": 4, "rlvr": 5}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("kills")
    digit_sums.build(schema.DigitSums(out=out / "data", train_rows=24, heldout_rows=2))
    tiny_model.run(
        schema.TinyModel(
            out=out / "tiny", data=out / "data" / "sft.json", system_prompt=SYSTEM_PROMPT
        )
    )
    upcycle(out / "tiny", out / "judge", 4, 2, 0.01, 0.02, 1)
    return out


def _train(root: Path, out: Path, stage: str) -> None:
    os.chdir(root)
    sections = STAGES[stage] | {"run": {"dir": out}}
    if stage == "sft":
        sft.run(schema.SFT.model_validate(sections))
    elif stage == "align":
        alignment.run(schema.Align.model_validate(sections))
    else:
        rlvr.run(schema.RLVR.model_validate(sections))


def _lines(out: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(CLOCKS)} for line in lines]


def _steps(out: Path) -> int:
    """Lines of metrics.jsonl so far."""
    file = out / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def _newest(out: Path) -> int:
    return max((int(p.name[5:]) for p in (out / "checkpoints").glob("step_*")), default=0)


def _being_written(out: Path) -> int:
    """Step of the checkpoint that is."""
    found = (out / "checkpoints").glob(".step_*.partial")
    return max((int(path.name.split(".")[1][5:]) for path in found), default=0)


class Killer(threading.Thread):
    """Kills a rank at a random moment after a random step or, with saving, of a checkpoint's
    writing."""

    def __init__(
        self, world: Ranks, out: Path, chance: random.Random, active: bool, saving: bool
    ) -> None:
        super().__init__()
        self.active = active
        self.world, self.out, self.over, self.killed = world, out, threading.Event(), False
        # two saves further on the first of them is complete
        self.target = _newest(out) + chance.randint(1, 6)
        self.reached = _being_written if saving else _steps
        self.delay = chance.choice([0, chance.uniform(0, 0.01 if saving else 0.1)])
        self.rank = chance.randrange(world.world)

    def run(self) -> None:
        while self.active and not self.over.wait(0.002):
            if self.reached(self.out) >= self.target:
                self.over.wait(self.delay)
                self.killed = not self.over.is_set()
                if self.killed:
                    os.kill(self.world.processes[self.rank].pid, signal.SIGKILL)
                return


def _check_complete(out: Path) -> None:
    for path in (out / "checkpoints").glob("step_*"):
        assert json.loads((path / "state.json").read_text())["step"] == int(path.name[5:])
        models = [p for p in path.iterdir() if p.is_dir()]
        assert models, path
        assert all((m / "metadata.json").exists() and (m / "hf").is_dir() for m in models)


@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_run_goes_on_as_if_it_had_not_been(stage: str, root: Path, tmp_path: Path) -> None:
    whole, out, chance = tmp_path / "whole", tmp_path / "killed", random.Random(stage)
    world = Ranks(2)
    try:
        world.run(_train, root, whole, stage)
        wanted, kills = _lines(whole), 0
        norms = {line.get("grad_norm", line.get("policy_grad_norm")) for line in wanted}
        assert len(norms) == len(wanted) == STAGES[stage]["train"]["steps"]
        if stage == "align":
            assert wanted[0]["alarms"] == 0 and wanted[-1]["alarms"] == 1
        is_over, resumed, half_written = False, set[int](), 0
        while kills < KILLS[stage] or not is_over:
            if is_over:
                # it had come to its end before all kills
                shutil.rmtree(out)
            active, saving = kills < KILLS[stage], kills % 2 == 1
            killer = Killer(world, out, chance, active, saving)
            killer.start()
            try:
                world.run(_train, root, out, stage)
                is_over = True
            except AssertionError as error:
                is_over = False
                assert killer.killed, error
            killer.over.set()
            killer.join()
            if killer.killed and is_over:
                # too late: the next run needs other ranks
                world.restart()
            kills += killer.killed
            half_written += bool(_being_written(out))
            _check_complete(out)
            resumed.add(_newest(out))
            if is_over:
                assert _lines(out) == wanted
    finally:
        world.close()
    assert (out / "hf" / "config.json").exists()
    assert half_written
    # from the start and the end, and from checkpoints in between
    assert len(resumed - {0, STAGES[stage]["train"]["steps"]}) > 1
