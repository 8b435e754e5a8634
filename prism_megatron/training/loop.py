"""Steps from the last checkpoint to the last step: metrics, progress, checkpoints, export.

    step(i) -> metrics --> metrics.jsonl and others (training/metrics_log.py), progress (step, loss
          or reward, time left)
          every save_every steps and at the end: checkpoints/step_NNNNNN/{state.json, MODEL/}
          at the end: hf/ in Hugging Face format

A run that is started again goes on after the newest checkpoint (training/saving.py) and repeats
nothing that it had written.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from checkpoint_tools import hf_writer
from checkpoint_tools.command import REQUEUE
from checkpoint_tools.headers import hf_directory
from model_providers.weight_plan import WeightPlan
from prism_megatron import phases
from prism_megatron.config.schema import Stage
from prism_megatron.data.stream import BatchStream, Quarantine
from prism_megatron.training.display import Display
from prism_megatron.training.guard import Guard, Unsound, UnsoundInference
from prism_megatron.training.metrics_log import Metrics, MetricsLog, drop_after
from prism_megatron.training.preemption import Preemption
from prism_megatron.training.runner import ModelRunner
from prism_megatron.training.saving import SLOW_DISK_SECONDS, Checkpoints
from prism_megatron.training.setup import collective_timeout
from prism_megatron.training.watchdog import Watchdog, reached


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
        restore: Callable[[dict[str, Any] | None, int], object] = lambda found, step: None,
        skipped: Callable[[int], object] = lambda step: None,
    ) -> None:
        """runners: each model by its name in checkpoints, with the path it was loaded from;
        shown: the metric beside the progress bar; carried: what else of the stage a checkpoint
        holds, in JSON; restore: gets that and the step once the models have their weights; None at
        the start of a run, and where what is carried must be forgotten; skipped: gets the number of
        updates so far where a step broke off and the run goes on with the next one."""
        self.config, self.runners, self.stream = config, runners, stream
        self.quarantine, self.shown = quarantine, shown
        self.carried, self.restore, self.skipped = carried, restore, skipped
        self.guard = Guard(config.train.guard)
        self.dir = config.run.dir
        self.checkpoints = Checkpoints(self.dir / "checkpoints", runners, config.train)
        self.is_writer = dist.get_rank() == 0
        self.step = self._rewinds = 0
        # ranks agree in host memory, so that no device is waited for
        self._agreement = dist.new_group(backend="gloo", timeout=collective_timeout(config.run))

    def resume(self) -> int:
        """Load the newest checkpoint of this run, if there is one; the steps already done."""
        self.checkpoints.remove_leftovers()
        found = self._load_newest()
        if found:
            self.stream.restore(found["data"])
            self.guard.load_state_dict(found["guard"])
        self.restore(found["carried"] if found else None, self.step)
        return self.step

    def _load_newest(self) -> dict[str, Any]:
        """The newest checkpoint's models, and its state; nothing if there is none."""
        state: dict[str, Any] = {}
        if path := self.checkpoints.newest():
            state = self.checkpoints.load(path)
            self.step = state["step"]
        if self.is_writer:
            drop_after(self.dir, self.step)
        dist.barrier()
        return state

    def _skip(self, error: Unsound) -> None:
        """Leave the rest of the step out for what a model inferred; Unsound if train.guard has it
        otherwise."""
        if not isinstance(error, UnsoundInference):
            raise error
        self.guard.refuse(str(error))
        self.skipped(self.step + 1)

    def _rewind(self, error: Unsound) -> None:
        """Go back to the last checkpoint, and on with the data after that which the error came of;
        the error itself, with where and how to go on, if the run has to stop."""
        self.checkpoints.finish()
        guard, path = self.config.train.guard, self.checkpoints.newest()
        advice = f"go on from {path}" if path else "there is no checkpoint yet"
        message = f"step {self.step + 1} of {self.dir.name}: {error}"
        if guard.action != "rewind" or path is None or self._rewinds == guard.limit:
            again = f" after {self._rewinds} returns to it" if self._rewinds else ""
            raise Unsound(
                f"{message}. The run stops before this update: {advice}{again}, at a lower "
                "learning rate or without this batch"
            ) from error
        if self.is_writer:
            print(f"{message}: back to {path}, past this batch", file=sys.stderr, flush=True)
        self._rewinds += 1
        reached("a checkpoint's return", SLOW_DISK_SECONDS)
        self._load_newest()
        self.restore(None, self.step)

    def run(self, step: Callable[[], Metrics]) -> bool:
        """Call `step` until the configured end; True if that, or the data's end, was reached, False
        if stop_at was. SystemExit after a checkpoint where a signal asked for it (Preemption)."""
        train = self.config.train
        last = min(train.steps, train.stop_at or train.steps)
        ended, metrics = "", Metrics()
        phases.take(0.0)  # of what came before the first step
        with (
            MetricsLog(self.config, self.step) if self.is_writer else nullcontext() as log,
            Preemption() as preemption,
            Watchdog(self.dir / "stacks", self.config.run.hang_timeout) as watchdog,
            Display(
                self.dir.name, "step", train.steps, self.step, active=self.is_writer
            ) as display,
        ):
            while self.step < last:
                started = time.monotonic()
                watchdog.begin(self.step + 1)
                try:
                    metrics = step()
                except EndOfData as end:
                    ended = f"{self.dir.name} ends after step {self.step} of {train.steps}: {end}"
                    break
                except Unsound as error:
                    try:
                        self._skip(error)
                    except Unsound as final:
                        self._rewind(final)
                        continue
                    metrics = Metrics()
                else:
                    self.guard.accept({})
                self.step += 1
                seconds = time.monotonic() - started
                metrics |= {"step": self.step, "time": seconds, **phases.take(seconds)}
                metrics |= self._skipped() | self.checkpoints.take_times()
                metrics |= {f"epoch/{name}": n for name, n in self.stream.epochs.items()}
                if log is not None:
                    log.write(self.step, metrics)
                value = metrics.get(self.shown)
                display.update(
                    self.step, f"{self.shown} {'-' if value is None else f'{value:.4f}'}"
                )
                is_asked, is_writing = self._on_any_rank(
                    preemption.asked, self.checkpoints.is_writing
                )
                if not is_writing:
                    self.checkpoints.finish()
                is_due = train.save_every and self.step % train.save_every == 0
                if is_asked or is_due or self.step == last:
                    self._save(metrics)
                if is_asked:
                    self.checkpoints.finish()
                    raise SystemExit(REQUEUE)
            if ended:
                self._save(metrics)
                if self.is_writer:
                    print(ended, flush=True)
            self.checkpoints.close()
            if log is not None:
                log.add(self.step, self.checkpoints.take_times())
        if self.is_writer and self.quarantine.total:
            print(self.quarantine.summary(), flush=True)
        return bool(ended) or self.step >= train.steps

    def _on_any_rank(self, *mine: bool) -> list[bool]:
        flags = torch.tensor(mine)
        dist.all_reduce(flags, dist.ReduceOp.MAX, self._agreement)
        found: list[bool] = flags.tolist()
        return found

    def export(self, name: str) -> None:
        """Write run.dir/hf: that model in Hugging Face format."""
        runner, source = self.runners[name]
        plan = WeightPlan(runner.model, receivers=[0])
        config_from = hf_directory(source)
        hf_writer.write(self.dir / "hf", plan.weights(), plan.nbytes, config_from)

    def _save(self, metrics: Metrics) -> None:
        self._rewinds = 0
        self.checkpoints.save(
            self.step,
            lambda: {
                "data": self.stream.state,
                "carried": self.carried(),
                "guard": self.guard.state_dict(),
            },
            metrics,
        )

    def _skipped(self) -> Metrics:
        if self.config.train.guard.action != "skip":
            return {}
        guards = [self.guard, *(runner.guard for runner, _ in self.runners.values())]
        return {"skipped_updates": sum(guard.take_skipped() for guard in guards)}
