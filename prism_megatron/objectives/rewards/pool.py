"""Answers compared in processes that are killed when they take too much time or memory.

    questions --threads, one a process--> worker.py --> verdicts
                                             `- too slow, too big, dead: killed, another is started

A policy is free to write 9^9^9^9, or formulas whose parsing takes forever. Such an answer costs its
own time limit and nothing else: the other processes go on, and the next question finds a new one.
"""

from __future__ import annotations

import json
import logging
import queue
import select
import subprocess
import sys
import time
import weakref
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import IO

import psutil

from prism_megatron.objectives.rewards.types import Verdict

logger = logging.getLogger(__name__)
_STARTUP_SECONDS = 120.0
_SECONDS_BETWEEN_LOOKS = 0.05
WORKER = "prism_megatron.objectives.rewards.worker"
_START = "import sys; sys.path[:] = {path!r}; from {module} import serve; serve({seconds})"

Question = tuple[str, str, Sequence[str]]
"""Arguments of worker.compare: rules, answer, truths."""


class ComparisonPool:
    """`workers` processes; each starts at its first question."""

    def __init__(self, workers: int, timeout: float, memory_gb: float) -> None:
        """timeout: seconds for one question; memory_gb: resident GiB that one may take."""
        self._threads = ThreadPoolExecutor(workers)
        self._workers = [_Worker(timeout, int(memory_gb * 2**30)) for _ in range(workers)]
        # the last one used comes first, so that few questions start few processes
        self._idle: queue.LifoQueue[_Worker] = queue.LifoQueue()
        for worker in self._workers:
            self._idle.put(worker)
        self._finalizer = weakref.finalize(self, _stop, self._threads, self._workers)

    def compare(self, questions: Iterable[Question]) -> list[Verdict]:
        """A verdict for each, in order.

        One that got no verdict is logged and wrong by the rule "timeout", "memory", "crash" (the
        process ended) or "error" (it raised). Raises RuntimeError if no process can start, as when
        math-verify is not installed.
        """
        return list(self._threads.map(self._ask, questions))

    def close(self) -> None:
        """End all processes."""
        self._finalizer()

    def _ask(self, question: Question) -> Verdict:
        worker = self._idle.get()
        try:
            return worker.ask(question)
        finally:
            self._idle.put(worker)


def _stop(threads: ThreadPoolExecutor, workers: Sequence[_Worker]) -> None:
    threads.shutdown(cancel_futures=True)
    for worker in workers:
        worker.stop()


class _Worker:
    """One process at a time, which is replaced when it fails."""

    def __init__(self, timeout: float, memory: int) -> None:
        self._timeout, self._memory = timeout, memory
        self._process: subprocess.Popen[str] | None = None
        self._is_ready = False

    def ask(self, question: Question) -> Verdict:
        if self._process is not None and self._is_worn(self._process):
            self.stop()
        if self._process is None:
            self._start()
        self._wait_until_ready()
        stdin, stdout = self._pipes()
        try:
            stdin.write(json.dumps(question) + "\n")
            stdin.flush()
            failure = self._watch()
        except BrokenPipeError:
            failure = "crash"
        reply = "" if failure else stdout.readline()
        if not reply:
            # the next process imports its libraries before it is asked
            self.stop()
            self._start()
            return _without_verdict(failure or "crash", question)
        verdict = json.loads(reply)
        return Verdict(*verdict) if verdict else _without_verdict("error", question)

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _start(self) -> None:
        code = _START.format(path=sys.path, module=WORKER, seconds=self._timeout)
        self._process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )
        self._is_ready = False

    def _wait_until_ready(self) -> None:
        if self._is_ready:
            return
        _, stdout = self._pipes()
        # a library may print while it is imported
        if not _has_words(stdout, _STARTUP_SECONDS) or "ready\n" not in iter(stdout.readline, ""):
            self.stop()
            raise RuntimeError(
                "a process that compares answers did not start; its error is printed above, "
                "try `python -c 'import math_verify'`"
            )
        self._is_ready = True

    def _is_worn(self, process: subprocess.Popen[str]) -> bool:
        """Whether it ended between two questions, as by the out-of-memory killer, or keeps so much
        that the next question would have too little."""
        return process.poll() is not None or _resident(process.pid) > self._memory / 2

    def _watch(self) -> str:
        """Wait for a reply or the end of the process; the limit that was crossed, if one was."""
        _, stdout = self._pipes()
        assert self._process is not None
        deadline = time.monotonic() + self._timeout
        while not _has_words(stdout, _SECONDS_BETWEEN_LOOKS):
            if time.monotonic() > deadline:
                return "timeout"
            if _resident(self._process.pid) > self._memory:
                return "memory"
        return ""

    def _pipes(self) -> tuple[IO[str], IO[str]]:
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        return process.stdin, process.stdout


def _has_words(pipe: IO[str], seconds: float) -> bool:
    """Whether there is something to read, or the end, within so many seconds."""
    # select() refuses file descriptors from 1024 on, and a rank among a thousand has more
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


def _resident(pid: int) -> int:
    """Bytes in memory; 0 if the process has ended."""
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.NoSuchProcess:
        return 0


def _without_verdict(failure: str, question: Question) -> Verdict:
    rules, answer, truths = question
    logger.warning(
        "no verdict (%s) by rules %s, counted as wrong: %.200r for %.200r",
        failure,
        rules,
        answer,
        truths[0],
    )
    return Verdict(False, failure)
