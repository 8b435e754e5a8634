"""RLVR with engines under the launcher, with its engines, Ray and a rank killed one by one."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

import psutil
import pytest

from tests.e2e.stages import QUICKSTART, Job, metrics, prepare

pytestmark = pytest.mark.timeout(900)
CLOCKS = {"time", "sync_s", "save_s", "save_stall_s"}
STEPS = 12


def rlvr(root: Path, out: Path, *overrides: str) -> list[str]:
    """Two prompts a step, one for each rank, so that engines get what ranks alone would."""
    return [
        "rlvr",
        f"--config={QUICKSTART}/rlvr.yaml",
        f"vars.dir={root}",
        f"run.dir={out}",
        f"policy.path={root}/tiny",
        "policy.parallel.tensor=1",
        "prompts_per_step=2",
        "sampling.n=2",
        "sampling.max_new_tokens=10",
        # of texts without format nothing is rewarded, but the entropy has a gradient
        "entropy_coef=0.1",
        f"train.steps={STEPS}",
        "train.save_every=2",
        "train.micro_batch_tokens=1024",
        *overrides,
    ]


def named(job: Job, name: str) -> list[psutil.Process]:
    """The job's processes with that in their command line."""
    found = []
    for process in psutil.Process(job.process.pid).children(recursive=True):
        try:
            if name in " ".join(process.cmdline()[:1]):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def test_dead_engines_do_not_stop_training_and_a_dead_rank_or_ray_only_for_a_restart(
    tmp_path: Path,
) -> None:
    prepare(tmp_path)
    whole, out, chance = tmp_path / "whole", tmp_path / "killed", random.Random(3)
    status, output = Job(rlvr(tmp_path, whole)).end()
    assert status == 0, output[-6000:]
    engines = ("rollout.kind=local", "rollout.engines=2", "rollout.health_interval=1")
    job = Job(rlvr(tmp_path, out, *engines), restarts=2)

    job.wait_for(lambda: len(metrics(out)) >= 2)
    first = job.ranks()
    chance.choice(named(job, "ray::AsyncLocalEngine")).kill()
    job.wait_for(lambda: len(metrics(out)) >= 5)
    assert job.ranks() == first

    named(job, "gcs_server")[0].kill()
    job.wait_for(lambda: job.ranks() and not set(job.ranks()) & set(first))
    job.wait_for(lambda: len(metrics(out)) >= 8)
    os.kill(chance.choice(job.ranks()).pid, signal.SIGKILL)

    status, output = job.end()
    assert status == 0, output[-6000:]
    wanted, found = (
        [{k: v for k, v in line.items() if k not in CLOCKS} for line in metrics(path)]
        for path in (whole, out)
    )
    assert len({line["grad_norm"] for line in wanted}) == STEPS
    assert found == wanted
