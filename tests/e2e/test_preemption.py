"""Signals: a checkpoint after the step at hand, and a status that has the job queued again."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.e2e.stages import Job, checkpoints, metrics, prepare, sft


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("preemption")
    prepare(out)
    return out


def test_signals_have_every_rank_save_and_the_job_queued_again(root: Path, tmp_path: Path) -> None:
    """One rank is told first, then the launcher; restarts that are left are not taken."""
    steps = 0
    for number, to_launcher in [(signal.SIGUSR1, False), (signal.SIGTERM, True)]:
        job = Job.launched(sft(root, tmp_path, 10**6), restarts=2)
        job.wait_for(lambda before=steps: len(metrics(tmp_path)) > before)
        if to_launcher:
            os.kill(job.process.pid, number)
        else:
            job.ranks()[1].send_signal(number)
        status, output = job.end()
        assert status == os.EX_TEMPFAIL, output[-3000:]
        assert f"rank 1: {number.name}, ends after this step's checkpoint" in output
        found = [line["step"] for line in metrics(tmp_path)]
        assert found == list(range(1, len(found) + 1)) and len(found) > steps
        assert checkpoints(tmp_path) == [f"step_{len(found):06d}"]
        steps = len(found)


def test_a_signal_before_there_is_anything_to_save(root: Path, tmp_path: Path) -> None:
    job = Job.launched(sft(root, tmp_path, 10**6), ranks=1)
    # the configuration is written before torch is imported
    job.wait_for(lambda: list(tmp_path.glob("*")) and job.ranks())
    job.ranks()[0].send_signal(signal.SIGUSR1)
    status, output = job.end()
    assert status == os.EX_TEMPFAIL, output[-3000:]
    assert not metrics(tmp_path)
