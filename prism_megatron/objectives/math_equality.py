"""Whether two mathematical expressions are equal, by math-verify in a process of its own.

math-verify bounds its time by SIGALRM, which works on the main thread alone and does not stop a
computation inside C, such as the exact value of 9^9^9^9 that a policy is free to write. The process
here is killed when its time is up, from any thread, and a new one takes its place.
"""

from __future__ import annotations

import atexit
import json
import logging
import select
import subprocess
import sys
import threading
from typing import IO

logger = logging.getLogger(__name__)
_STARTUP_SECONDS = 120.0
_MEMORY_BYTES = 4 << 30


class MathVerifier:
    """Asks a child process, which is started at the first question."""

    def __init__(self, timeout: float = 5.0) -> None:
        """timeout: seconds for one comparison."""
        self.timeout = timeout
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        atexit.register(self.close)

    def equal(self, answer: str, truth: str) -> bool:
        """Whether two LaTeX expressions, without delimiters, are mathematically equal.

        A comparison that runs out of time or memory is logged and counts as unequal. Raises
        RuntimeError if the child process can't start, as when math-verify is not installed.
        """
        with self._lock:
            if self._process is not None and self._process.poll() is not None:
                self.close()  # ended between two questions, as by the out-of-memory killer
            process = self._process or self._start()
            stdin, stdout = _pipes(process)
            stdin.write(json.dumps([answer, truth]) + "\n")
            stdin.flush()
            reply = _read_line(stdout, self.timeout)
            if reply:
                return bool(json.loads(reply))
            logger.warning(
                "math-verify gave no verdict (limit %.1f s), counted as unequal: %r and %r",
                self.timeout,
                answer,
                truth,
            )
            self.close()
            return False

    def close(self) -> None:
        """Ends the child process; the next question starts another."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _start(self) -> subprocess.Popen[str]:
        # -P: the modules next to this file must not shadow those that math-verify imports.
        process = subprocess.Popen(
            [sys.executable, "-P", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )
        self._process = process
        if _read_line(_pipes(process)[1], _STARTUP_SECONDS) != "ready\n":
            self.close()
            raise RuntimeError(
                "the process that runs math-verify did not start; its error is printed above, "
                "try `python -c 'import math_verify'`"
            )
        return process


def _pipes(process: subprocess.Popen[str]) -> tuple[IO[str], IO[str]]:
    assert process.stdin is not None and process.stdout is not None
    return process.stdin, process.stdout


def _read_line(stream: IO[str], seconds: float) -> str:
    """The next line, or "" if none comes in time or the other side has ended."""
    ready, _, _ = select.select([stream], [], [], seconds)
    return stream.readline() if ready else ""


def _serve() -> None:
    import resource

    from math_verify import LatexExtractionConfig, parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    print("ready", flush=True)
    for line in sys.stdin:
        # Timeouts are off because the parent kills this process instead.
        answer, truth = (
            parse(
                f"${text}$",
                [LatexExtractionConfig()],
                fallback_mode="no_fallback",
                parsing_timeout=None,
            )
            for text in json.loads(line)
        )
        equal = bool(answer and truth) and verify(truth, answer, timeout_seconds=None)
        print(json.dumps(equal), flush=True)


if __name__ == "__main__":
    _serve()
