"""Hostile answers in real processes with real time limits."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import psutil
import pytest

from prism_megatron.objectives.rewards import pool as pool_module
from prism_megatron.objectives.rewards.pool import ComparisonPool, Question
from prism_megatron.objectives.rewards.types import Verdict

ENDLESS: Question = ("corrected", "9^{9^{9^{9^{9}}}}", ["9^{9^{9^{9}}} + 1"])
EASY: Question = ("corrected", "2x+x", ["3x"])
RIGHT = Verdict(True, "expression")


@pytest.fixture
def pool() -> Iterator[ComparisonPool]:
    pool = ComparisonPool(workers=2, timeout=60, memory_gb=2)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def shared() -> Iterator[ComparisonPool]:
    pool = ComparisonPool(workers=2, timeout=4, memory_gb=2)
    yield pool
    pool.close()


def processes(pool: ComparisonPool) -> list[psutil.Process]:
    return [
        psutil.Process(worker._process.pid)
        for worker in pool._workers
        if worker._process is not None
    ]


def set_timeout(pool: ComparisonPool, seconds: float) -> None:
    for worker in pool._workers:
        worker._timeout = seconds


def test_verdicts_come_in_order_of_the_questions(pool: ComparisonPool) -> None:
    questions: list[Question] = [("corrected", str(n % 3), ["1"]) for n in range(40)]
    assert [v.correct for v in pool.compare(questions)] == [n % 3 == 1 for n in range(40)]
    assert pool.compare([]) == []


def test_a_process_with_many_open_files_compares_too(pool: ComparisonPool) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    held = [os.dup(0) for _ in range(1100)]
    try:
        assert pool.compare([EASY]) == [RIGHT]
    finally:
        for file in held:
            os.close(file)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_an_endless_answer_costs_its_own_time_alone(
    pool: ComparisonPool, caplog: pytest.LogCaptureFixture
) -> None:
    assert pool.compare([EASY, EASY, EASY]) == [RIGHT] * 3
    before = {process.pid for process in processes(pool)}
    set_timeout(pool, 1.5)
    assert pool.compare([EASY, ENDLESS, EASY, EASY]) == [
        RIGHT,
        Verdict(False, "timeout"),
        RIGHT,
        RIGHT,
    ]
    assert "no verdict (timeout)" in caplog.text and "9^{9^{9^{9^{9}}}}" in caplog.text
    set_timeout(pool, 60)
    assert pool.compare([EASY] * 4) == [RIGHT] * 4
    killed = before - {process.pid for process in processes(pool)}
    assert len(killed) == 1 and not psutil.pid_exists(killed.pop())


@pytest.mark.parametrize(
    "question",
    [
        ("corrected", "{" * 10_000 + "1" + "}" * 10_000, ["1"]),
        ("corrected", "(" * 500 + "1" + ")" * 500, ["2"]),
        ("corrected", "((1,2)," * 150 + "3" + ")" * 150, ["((1,2)," * 150 + "4" + ")" * 150]),
        ("mm_gad", "{" * 10_000 + "1" + "}" * 10_000, ["2"]),
        ("geo3k", "{" * 10_000 + "1" + "}" * 10_000, ["2"]),
        ("math_verify", r"\frac{1}{" * 300 + "2" + "}" * 300, ["3"]),
        ("mm_gad", "$" + r"\sqrt{x+" * 100 + "1" + "}" * 100 + "$", ["3"]),
        ("geo3k", "x" * 100_000, ["3"]),
    ],
)
def test_deep_and_huge_answers_are_wrong_and_nothing_else(
    shared: ComparisonPool, question: Question
) -> None:
    [hostile, *easy] = shared.compare([question, EASY, EASY])
    assert not hostile.correct and hostile.rule != "error"
    assert easy == [RIGHT, RIGHT]


def test_an_answer_that_takes_too_much_memory_is_killed() -> None:
    pool = ComparisonPool(workers=1, timeout=120, memory_gb=0.25)
    try:
        huge: Question = ("corrected", "2^{10000000000}", ["3"])
        assert pool.compare([EASY, huge, EASY]) == [RIGHT, Verdict(False, "memory"), RIGHT]
    finally:
        pool.close()


def test_a_process_that_was_killed_between_two_questions_is_replaced(pool: ComparisonPool) -> None:
    assert pool.compare([EASY]) == [RIGHT]
    [process] = processes(pool)
    process.kill()
    process.wait()
    assert pool.compare([EASY]) == [RIGHT]


def test_a_process_that_dies_over_a_question_is_a_crash(pool: ComparisonPool) -> None:
    assert pool.compare([EASY]) == [RIGHT]
    [process] = processes(pool)

    def kill_when_busy() -> None:
        while process.cpu_times().user < started + 0.2:
            time.sleep(0.01)
        process.send_signal(signal.SIGSEGV)

    started = process.cpu_times().user
    killer = threading.Thread(target=kill_when_busy)
    killer.start()
    assert pool.compare([ENDLESS]) == [Verdict(False, "crash")]
    killer.join()
    assert pool.compare([EASY]) == [RIGHT]


def test_a_comparison_that_raises_is_an_error_and_the_process_goes_on(
    pool: ComparisonPool, capfd: pytest.CaptureFixture[str]
) -> None:
    assert pool.compare([EASY]) == [RIGHT]
    [process] = processes(pool)
    assert pool.compare([("no such rules", "1", ["1"])]) == [Verdict(False, "error")]
    assert pool.compare([EASY]) == [RIGHT]
    assert processes(pool) == [process]
    assert "KeyError" in capfd.readouterr().err


def test_no_process_is_started_before_the_first_question(pool: ComparisonPool) -> None:
    assert processes(pool) == []
    pool.compare([EASY])
    pool.compare([EASY])
    assert len(processes(pool)) == 1


def test_processes_end_with_the_pool(pool: ComparisonPool) -> None:
    pool.compare([EASY, EASY])
    pids = [process.pid for process in processes(pool)]
    pool.close()
    assert pids and not any(psutil.pid_exists(pid) for pid in pids)


def test_processes_that_cannot_start_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "WORKER", "prism_megatron.not_there")
    pool = ComparisonPool(workers=1, timeout=5, memory_gb=2)
    with pytest.raises(RuntimeError, match="did not start"):
        pool.compare([EASY])
    pool.close()


def test_a_worker_whose_parent_was_killed_ends(tmp_path: pytest.TempPathFactory) -> None:
    code = (
        "from prism_megatron.objectives.rewards.pool import ComparisonPool\n"
        "pool = ComparisonPool(workers=1, timeout=2, memory_gb=2)\n"
        f"pool.compare([{EASY!r}])\n"
        "print(pool._workers[0]._process.pid, flush=True)\n"
        "pool._workers[0]._timeout = 1000\n"
        f"pool.compare([{ENDLESS!r}])\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    worker = psutil.Process(int(parent.stdout.readline()))
    while worker.cpu_times().user < 0.1:
        time.sleep(0.01)
    os.kill(parent.pid, signal.SIGKILL)
    parent.communicate()
    psutil.wait_procs([worker], timeout=60)
    assert not worker.is_running()
