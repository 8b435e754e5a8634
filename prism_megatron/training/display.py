"""How far a stage is, and how long it will take."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


class Display:
    """A progress bar on a terminal, twenty lines in a log file, nothing unless active."""

    def __init__(
        self, title: str, unit: str, total: int, done: int, *, active: bool = True
    ) -> None:
        """unit: what is counted; done: of the total, before this run."""
        self.title, self.unit, self.total, self.active = title, unit, total, active
        self.done = self.done_before = done
        self.started = time.monotonic()
        terminal = active and Console().is_terminal
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}  {task.fields[shown]}"),
            TimeRemainingColumn(),
            disable=not terminal,
        )
        self.task = self.progress.add_task(title, total=total, completed=done, shown="")
        self.every = 0 if terminal else max(1, total // 20)

    def __enter__(self) -> Display:
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()

    def advance(self) -> None:
        """One more is done."""
        self.update(self.done + 1)

    def update(self, done: int, shown: str = "") -> None:
        """So many are done; shown: what else there is to say."""
        self.done = done
        self.progress.update(self.task, completed=done, shown=shown)
        if self.active and self.every and (done % self.every == 0 or done == self.total):
            pace = (time.monotonic() - self.started) / (done - self.done_before)
            left = pace * (self.total - done)
            print(
                f"{self.title} {self.unit} {done}/{self.total}  {shown}  "
                f"{pace:.2f} s/{self.unit}  {left:.0f} s left",
                flush=True,
            )
