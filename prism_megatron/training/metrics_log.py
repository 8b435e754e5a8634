"""Where rank 0 writes what each step measured.

    metrics of a step --> metrics.jsonl, tensorboard/ and, where the run has a `wandb` section,
                          Weights & Biases

A run that goes back to a checkpoint takes steps again. metrics.jsonl and TensorBoard then forget
what was after it; Weights & Biases can't, and has those steps twice.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from torch.utils.tensorboard import SummaryWriter

from checkpoint_tools.files import write_atomically
from prism_megatron.config.schema import Stage, Wandb

if TYPE_CHECKING:
    from wandb import Run

Metrics = dict[str, float]


class MetricsLog:
    """Of one run, from its start or a checkpoint to where it stops; to be used in a `with`."""

    def __init__(self, config: Stage, step: int) -> None:
        """step: how many were taken before."""
        self._file = config.run.dir / "metrics.jsonl"
        self._board = SummaryWriter(config.run.dir / "tensorboard", purge_step=step + 1)
        self._wandb = None if config.wandb is None else _tracked(config, config.wandb)

    def write(self, step: int, metrics: Metrics) -> None:
        """The line of a step."""
        # those of a skipped update may not be finite, which JSON does not know
        metrics = {name: value for name, value in metrics.items() if math.isfinite(value)}
        with self._file.open("a") as file:
            file.write(json.dumps(metrics) + "\n")
        self.add(step, metrics)

    def add(self, step: int, metrics: Metrics) -> None:
        """What became known of a step after its line was written."""
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(metrics | {"step": step})

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._board.close()
        if self._wandb is not None:
            status = error.code if isinstance(error, SystemExit) else int(error is not None)
            self._wandb.finish(exit_code=status if isinstance(status, int) else 1)


def drop_after(directory: Path, step: int) -> None:
    """Take the lines after a checkpoint out of metrics.jsonl, since its steps are taken again."""
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
    write_atomically(file, "".join(line + "\n" for line in kept))


def check_account(section: Wandb) -> None:
    """ValueError if Weights & Biases could not be written to; does not ask its server."""
    try:
        import wandb
    except ImportError as error:
        raise ValueError(
            "wandb names a project of Weights & Biases, whose package is not installed: "
            "pip install 'prism-megatron[wandb]', or leave the section out"
        ) from error
    if section.mode == "online" and not wandb.login(prompt=False):
        raise ValueError(
            "wandb.mode=online finds no account of Weights & Biases: set WANDB_API_KEY or run "
            "`wandb login`, or set wandb.mode=offline and send the files later by `wandb sync`"
        )


def _tracked(config: Stage, section: Wandb) -> Run:
    """The run of Weights & Biases; the same one whenever this folder's run goes on."""
    import wandb

    directory = config.run.dir
    file = directory / "wandb_id"
    settings: dict[str, Any] = config.model_dump(mode="json")
    run = wandb.init(
        project=section.project,
        entity=section.entity,
        name=section.name or directory.name,
        group=section.group,
        job_type=type(config).__name__.lower(),
        id=file.read_text() if file.exists() else None,
        resume="allow",
        dir=directory,
        mode=section.mode,
        config=settings,
        # progress is not for a log
        settings=wandb.Settings(console="off"),
    )
    write_atomically(file, run.id)
    # its own count may not go back to a checkpoint
    run.define_metric("*", step_metric="step")
    return run
