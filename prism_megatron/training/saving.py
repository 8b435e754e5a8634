"""A run's checkpoints: step_NNNNNN folders that are complete or not there.

save -> .step_NNNNNN.partial/{MODEL/, ...} --all ranks have written--> state.json -> step_NNNNNN
        async_save: a copy in host memory is written while training goes on
then older ones go, but the last `keep_checkpoints` and the best, while training goes on
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from checkpoint_tools import megatron_directory
from checkpoint_tools.files import staging_of, sync
from checkpoint_tools.headers import hf_directory
from prism_megatron.config import schema
from prism_megatron.training.runner import ModelRunner
from prism_megatron.training.watchdog import reached

SLOW_DISK_SECONDS = 1800
"""How long a checkpoint may take before it counts as hung."""


class Checkpoints:
    """All ranks call everything together."""

    def __init__(
        self, folder: Path, runners: dict[str, tuple[ModelRunner, Path]], config: schema.Train
    ) -> None:
        """runners: each model by its name in checkpoints, with the path it was loaded from."""
        self.folder, self.runners, self.config = folder, runners, config
        self._is_writer = dist.get_rank() == 0
        self._publish: Callable[[], None] | None = None
        self._models: list[megatron_directory.Saving] = []
        self._times: dict[str, float] = {}
        self._remover = threading.Thread()

    def newest(self) -> Path | None:
        """The one to go on from."""
        return max(self.folder.glob("step_*"), default=None)

    def load(self, path: Path) -> dict[str, Any]:
        """Load the models of a checkpoint; its state."""
        state: dict[str, Any] = json.loads((path / "state.json").read_text())
        for name, (runner, _) in self.runners.items():
            runner.load(path / name)
            runner.guard.load_state_dict(state["guards"][name])
        return state

    def remove_leftovers(self) -> None:
        """What a killed process was writing, or removing."""
        if self._is_writer:
            self._wait_for_remover()
            for path in self.folder.glob(".step_*"):
                shutil.rmtree(path)

    def save(
        self, step: int, state: Callable[[], dict[str, Any]], metrics: dict[str, float]
    ) -> None:
        """Begin a checkpoint, and without async_save also end it.

        state: what it holds beside the models, in JSON; metrics: of the step, among them that of
        keep_best. ValueError if the disk has no room, with the earlier checkpoints as they were.
        """
        self.finish()
        final = self.folder / f"step_{step:06d}"
        if final.exists():
            return
        started = time.monotonic()
        reached("a checkpoint", SLOW_DISK_SECONDS)
        staging = staging_of(final)
        if self._is_writer:
            self.remove_leftovers()
            staging.mkdir(parents=True)
        dist.barrier()
        self._models = [
            runner.begin_save(staging / name, hf_directory(source), self.config.async_save)
            for name, (runner, source) in self.runners.items()
        ]
        # on all ranks, which may have to wait for each other
        content = state() | {
            "step": step,
            "guards": {n: runner.guard.state_dict() for n, (runner, _) in self.runners.items()},
            "metrics": {name: value for name, value in metrics.items() if math.isfinite(value)},
        }

        def publish() -> None:
            for model in self._models:
                model.finish()
            if self._is_writer:
                (staging / "state.json").write_text(json.dumps(content))
                sync(staging / "state.json")
                os.replace(staging, final)
                self._remove_old()
            dist.barrier()
            self._count("save_s", started)

        self._publish = publish
        self._count("time/save", started)
        if not self.config.async_save:
            self.finish()

    @property
    def is_writing(self) -> bool:
        """Whether this rank's part of the checkpoint at hand is on its way."""
        return any(model.is_writing for model in self._models)

    def finish(self) -> None:
        """Wait for the checkpoint at hand, and give it its name; ValueError if it could not be
        written."""
        publish, self._publish = self._publish, None
        if publish is not None:
            started = time.monotonic()
            reached("the end of a checkpoint", SLOW_DISK_SECONDS)
            publish()
            self._models = []
            self._count("time/save", started)

    def close(self) -> None:
        """Wait for the checkpoint at hand, and until older ones are gone."""
        self.finish()
        self._wait_for_remover()

    def _wait_for_remover(self) -> None:
        if self._remover.ident is not None:
            self._remover.join()

    def take_times(self) -> dict[str, float]:
        """Seconds since the last call: time/save, that training waited, and save_s, from
        beginning to name, of what got one."""
        found, self._times = self._times, {}
        return found

    def _count(self, name: str, started: float) -> None:
        self._times[name] = self._times.get(name, 0.0) + time.monotonic() - started

    def _remove_old(self) -> None:
        found = sorted(self.folder.glob("step_*"))
        kept = {*found[-self.config.keep_checkpoints :], self._best(found)}
        going = []
        for path in found:
            if path not in kept:
                # a half-removed one has no name either
                going.append(path.with_name(f".{path.name}.removed"))
                os.replace(path, going[-1])

        def remove() -> None:
            for path in going:
                shutil.rmtree(path)

        # which takes minutes with terabytes, and all ranks wait for this one
        self._remover = threading.Thread(target=remove, name="remover", daemon=True)
        self._remover.start()

    def _best(self, found: list[Path]) -> Path | None:
        best = self.config.keep_best
        if best is None:
            return None
        values = {}
        for path in found:
            metrics = json.loads((path / "state.json").read_text())["metrics"]
            if best.metric in metrics:
                values[path] = metrics[best.metric]
        if found[-1] not in values:
            print(
                f"{found[-1].name} has no metric {best.metric} (train.keep_best), so it is not the "
                f"best; it has {', '.join(sorted(metrics))}",
                file=sys.stderr,
                flush=True,
            )
        sign = 1 if best.mode == "max" else -1
        # of equal ones the newest
        return max(values, key=lambda path: (sign * values[path], path), default=None)
