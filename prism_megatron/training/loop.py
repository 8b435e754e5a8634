"""Steps from the last checkpoint to the last step: metrics, progress, checkpoints, export.

    step(i) -> metrics --> metrics.jsonl, tensorboard/, progress (step, loss or reward, time left)
          every save_every steps and at the end: checkpoints/step_NNNNNN/{state.json, MODEL/}
          at the end: hf/ in Hugging Face format

A checkpoint folder appears under its name only when complete; a run that is started again goes on
after the newest one and repeats nothing that it had written.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from checkpoint_tools import hf_writer, megatron_directory
from checkpoint_tools.command import REQUEUE
from checkpoint_tools.files import write_atomically
from model_providers.weight_plan import iter_hf_weights
from prism_megatron.config.schema import Stage
from prism_megatron.data.stream import BatchStream, Quarantine
from prism_megatron.training.preemption import Preemption
from prism_megatron.training.runner import ModelRunner

Metrics = dict[str, float]


class EndOfData(Exception):
    """Raised by a step that finds no more data to train on: the run ends there, as if its last step
    had come. The message says why."""


class TrainingLoop:
    """The outer loop of every training stage; all ranks run it together."""

    def __init__(
        self,
        config: Stage,
        runners: dict[str, tuple[ModelRunner, Path]],
        stream: BatchStream[Any, Any],
        quarantine: Quarantine,
        shown: str,
        carried: Callable[[], dict[str, Any]] = dict,
    ) -> None:
        """runners: each model by its name in checkpoints, with the path it was loaded from;
        shown: the metric beside the progress bar; carried: what else of the stage a checkpoint
        holds, in JSON, which `resume` leaves in `found`."""
        self.config, self.runners, self.stream = config, runners, stream
        self.quarantine, self.shown = quarantine, shown
        self.carried, self.found = carried, dict[str, Any]()
        self.dir = config.run.dir
        self.is_writer = dist.get_rank() == 0
        self.step = 0
        # ranks agree in host memory, so that no device is waited for
        self._agreement = dist.new_group(backend="gloo")

    def resume(self) -> int:
        """Load the newest checkpoint of this run, if there is one; the steps already done."""
        found = sorted((self.dir / "checkpoints").glob("step_*"))
        if found:
            state = json.loads((found[-1] / "state.json").read_text())
            for name, (runner, _) in self.runners.items():
                runner.load(found[-1] / name)
            self.stream.restore(state["data"])
            self.step = state["step"]
            self.found = state.get("carried", {})
        if self.is_writer:
            self._drop_metrics_after(self.step)
        dist.barrier()
        return self.step

    def run(self, step: Callable[[], Metrics]) -> bool:
        """Call `step` until the configured end; True if that, or the data's end, was reached, False
        if stop_at was. SystemExit after a checkpoint where a signal asked for it (Preemption)."""
        train = self.config.train
        last = min(train.steps, train.stop_at or train.steps)
        ended = ""
        writer = (
            SummaryWriter(self.dir / "tensorboard", purge_step=self.step)
            if self.is_writer
            else None
        )
        with (
            Preemption() as preemption,
            _Display(self.dir.name, train.steps, self.step, self.is_writer) as display,
        ):
            while self.step < last:
                started = time.monotonic()
                try:
                    metrics = step()
                except EndOfData as end:
                    ended = f"{self.dir.name} ends after step {self.step} of {train.steps}: {end}"
                    break
                self.step += 1
                metrics |= {"step": self.step, "time": time.monotonic() - started}
                metrics |= {f"epoch/{name}": n for name, n in self.stream.epochs.items()}
                if writer is not None:
                    self._log(metrics, writer)
                display.update(self.step, self.shown, metrics.get(self.shown))
                is_asked = self._any_rank(preemption.asked)
                is_due = train.save_every and self.step % train.save_every == 0
                if is_asked or is_due or self.step == last:
                    self._save()
                if is_asked:
                    raise SystemExit(REQUEUE)
        if ended:
            self._save()
            if self.is_writer:
                print(ended, flush=True)
        if writer is not None:
            writer.close()
        if self.is_writer and self.quarantine.total:
            print(self.quarantine.summary(), flush=True)
        return bool(ended) or self.step >= train.steps

    def _any_rank(self, mine: bool) -> bool:
        flag = torch.tensor(mine)
        dist.all_reduce(flag, dist.ReduceOp.MAX, self._agreement)
        return bool(flag)

    def export(self, name: str) -> None:
        """Write run.dir/hf: that model in Hugging Face format."""
        runner, source = self.runners[name]
        hf_writer.write(
            self.dir / "hf",
            iter_hf_weights(runner.model),
            config_from=megatron_directory.hf_directory(source),
            writer=self.is_writer,
        )
        dist.barrier()

    def _save(self) -> None:
        folder = self.dir / "checkpoints"
        final = folder / f"step_{self.step:06d}"
        staging = folder / f".step_{self.step:06d}.partial"
        if self.is_writer:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
        dist.barrier()
        for name, (runner, source) in self.runners.items():
            runner.save(staging / name, megatron_directory.hf_directory(source))
        # on all ranks, which may have to wait for each other
        carried = self.carried()
        if self.is_writer:
            state = {"step": self.step, "data": self.stream.state, "carried": carried}
            (staging / "state.json").write_text(json.dumps(state))
            shutil.rmtree(final, ignore_errors=True)
            os.replace(staging, final)
            for old in sorted(folder.glob("step_*"))[: -self.config.train.keep_checkpoints]:
                shutil.rmtree(old)
        dist.barrier()

    def _log(self, metrics: Metrics, writer: SummaryWriter) -> None:
        for name, value in metrics.items():
            writer.add_scalar(name, value, self.step)
        with (self.dir / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(metrics) + "\n")

    def _drop_metrics_after(self, step: int) -> None:
        """Steps after the checkpoint will be taken again and must not be logged twice."""
        self.dir.mkdir(parents=True, exist_ok=True)
        file = self.dir / "metrics.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
        write_atomically(file, "".join(line + "\n" for line in kept))


class _Display:
    """A progress bar on a terminal, twenty lines in a log file, nothing on other ranks."""

    def __init__(self, title: str, steps: int, done: int, active: bool) -> None:
        self.title, self.steps, self.active = title, steps, active
        self.done_before, self.started = done, time.monotonic()
        terminal = active and Console().is_terminal
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}  {task.fields[shown]}"),
            TimeRemainingColumn(),
            disable=not terminal,
        )
        self.task = self.progress.add_task(title, total=steps, completed=done, shown="")
        self.every = 0 if terminal else max(1, steps // 20)

    def __enter__(self) -> _Display:
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()

    def update(self, step: int, name: str, value: float | None) -> None:
        shown = f"{name} -" if value is None else f"{name} {value:.4f}"
        self.progress.update(self.task, completed=step, shown=shown)
        if self.active and self.every and (step % self.every == 0 or step == self.steps):
            pace = (time.monotonic() - self.started) / (step - self.done_before)
            left = pace * (self.steps - step)
            print(
                f"{self.title} step {step}/{self.steps}  {shown}  {pace:.2f} s/step  "
                f"{left:.0f} s left",
                flush=True,
            )
