"""RLVR under the launcher: an engine dies, the ranks are asked to end, Ray's head dies."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import psutil
import pytest

from checkpoint_tools.command import REQUEUE
from tests.e2e.stages import QUICKSTART, Job, metrics, prepare

pytestmark = pytest.mark.timeout(900)
BESIDE = ("time", "sync_s", "save_s", "time/", "engine_restarts")
"""Metrics that are not the training's."""
STEPS = 60
"""More than are taken without Ray, until the rank that started it notices."""


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


def test_dead_engines_do_not_stop_training_and_a_dead_ray_only_for_a_restart(
    tmp_path: Path,
) -> None:
    prepare(tmp_path)
    whole, out, chance = tmp_path / "whole", tmp_path / "killed", random.Random(3)
    status, output = Job.launched(rlvr(tmp_path, whole)).end()
    assert status == 0, output[-6000:]
    stage = rlvr(
        tmp_path, out, "rollout.kind=local", "rollout.engines=2", "rollout.health_interval=1"
    )

    job = Job.launched(stage)
    job.wait_for(lambda: len(metrics(out)) >= 2)
    time.sleep(chance.uniform(0, 1))
    ranks = job.ranks()
    chance.choice(job.wait_for(lambda: job.others("ray::AsyncLocalEngine"))).kill()
    job.wait_for(lambda: len(metrics(out)) >= 5)
    assert job.ranks() == ranks
    started = [*ranks, *job.others("ray"), *job.others("gcs_server")]
    for rank in ranks:
        rank.send_signal(signal.SIGTERM)
    status, output = job.end()
    assert status == REQUEUE, output[-6000:]
    gone, alive = psutil.wait_procs(started, timeout=60)
    assert not alive and len(gone) > 5

    job = Job.launched(stage, restarts=1)
    done = len(metrics(out))
    job.wait_for(lambda: len(metrics(out)) > done)
    ranks = job.ranks()
    time.sleep(chance.uniform(0, 1))
    job.others("gcs_server")[0].kill()
    job.wait_for(lambda: job.ranks() and not set(job.ranks()) & set(ranks))
    status, output = job.end()
    assert status == 0, output[-6000:]

    wanted, found = (
        [{k: v for k, v in line.items() if not k.startswith(BESIDE)} for line in metrics(path)]
        for path in (whole, out)
    )
    assert len({line["grad_norm"] for line in wanted}) == STEPS
    assert found == wanted
