"""Training stages on two ranks as a launcher runs them, to be killed: a tiny model, a few rows."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import psutil

from prism_megatron.config import schema
from prism_megatron.data import digit_sums
from prism_megatron.pipelines import tiny_model
from tests.processes import started_by

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = ROOT / "configs" / "quickstart"
ENVIRONMENT = {"GLOO_SOCKET_IFNAME": "lo", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def prepare(root: Path) -> None:
    """data/ and tiny/ in `root`."""
    digit_sums.build(schema.DigitSums(out=root / "data", train_rows=48, heldout_rows=2))
    tiny_model.run(
        schema.TinyModel(
            out=root / "tiny",
            data=root / "data" / "sft.json",
            system_prompt=QUICKSTART / "system_prompt.txt",
        )
    )


def sft(root: Path, out: Path, steps: int, *overrides: str) -> list[str]:
    """The arguments of a run with an update every tenth of a second."""
    return [
        "sft",
        f"--config={QUICKSTART}/sft.yaml",
        f"vars.dir={root}",
        f"run.dir={out}",
        f"model.path={root}/tiny",
        "model.parallel.tensor=1",
        "batch_size=4",
        f"train.steps={steps}",
        "train.micro_batch_tokens=1024",
        *overrides,
    ]


class Job:
    """A command in a session of its own."""

    def __init__(self, command: list[str], **variables: object) -> None:
        self.seen: list[dict[str, Any]] = []
        """Of this host's processes, where `others` looked last."""
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | ENVIRONMENT | {name: str(value) for name, value in variables.items()},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    @classmethod
    def launched(cls, stage: list[str], *, ranks: int = 2, restarts: int = 0) -> Self:
        """A stage under our launcher."""
        command = [sys.executable, "launch/node.py", *stage]
        return cls(command, NPROC_PER_NODE=ranks, MAX_RESTARTS=restarts)

    def wait_for[T](self, event: Callable[[], T], seconds: float = 300) -> T:
        """Until something is so, which is returned; AssertionError if the job ends before."""
        deadline = time.monotonic() + seconds
        while not (found := event()):
            assert self.process.poll() is None, (self.end()[1][-6000:], self.seen)
            assert time.monotonic() < deadline, f"not within {seconds} s"
            time.sleep(0.01)
        return found

    def ranks(self) -> list[psutil.Process]:
        """The ranks that are there now, in their order."""
        found = dict[int, psutil.Process]()
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess, KeyError):
                # the launcher has no number, and Ray, which has rank 0's, another command
                if "prism_megatron" in process.cmdline():
                    # a rank before what it has just forked
                    found.setdefault(int(process.environ()["LOCAL_RANK"]), process)
        return [found[rank] for rank in sorted(found)]

    def others(self, name: str) -> list[psutil.Process]:
        """Processes that ranks have started, with that in their program's name."""
        self.seen = [p.info for p in psutil.process_iter(["pid", "ppid", "name"])]
        return started_by(self.process.pid, lambda process: name in "".join(process.cmdline()[:1]))

    def end(self, seconds: float = 300) -> tuple[int, str]:
        """Wait for its end; exit status and what was printed."""
        output, _ = self.process.communicate(timeout=seconds)
        return self.process.returncode, output


def metrics(out: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl."""
    file = out / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def checkpoints(out: Path) -> list[str]:
    """Names in the run's checkpoints folder, half-written ones included; not what was half removed
    when the run was preempted, since nobody waits for that then: its next start removes it."""
    found = (path.name for path in (out / "checkpoints").glob("*"))
    return sorted(name for name in found if not name.endswith(".removed"))
