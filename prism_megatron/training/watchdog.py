"""A run that hangs: which ranks are missing, what every rank is doing, and an end.

each rank:  reached("...") --> where it is; the same place for too long? --> the world's store
all ranks:  stacks --> run.dir/stacks/rank_N.txt; place and collectives --> the store
one rank:   who has not entered the collectives that others wait in --> stderr, stacks/hang.txt
all ranks:  exit status HUNG, so that the launcher starts the job again or ends it
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Self

import torch.distributed as dist

HUNG = os.EX_SOFTWARE
"""Exit status of every rank of a run that hung."""
WARM_UP = 3
"""How many times as long anything may take in the first step of a process."""
ANSWER_SECONDS = 30
"""How long ranks are waited for to say where they are."""
OUR_FOLDERS = ("prism_megatron", "checkpoint_tools", "model_providers")

_numbers = count()
_place = ("the start", time.monotonic(), 0.0)


def reached(phase: str, allowed: float = 0.0) -> None:
    """This rank makes progress. allowed: seconds that it may take until the next call, if that is
    more than run.hang_timeout."""
    global _place
    _place = phase, time.monotonic(), allowed


@dataclass(frozen=True)
class Answer:
    """Where a rank is. collectives: how many it has entered in each group, whose name starts with
    its ranks; waits: whether it waits in one; line: of our code, the innermost."""

    host: str
    pid: int
    step: int
    phase: str
    seconds: float
    waits: bool
    line: str
    collectives: dict[str, int]


class Watchdog:
    """Watches this rank, from `with` to its end; all ranks have one."""

    def __init__(self, folder: Path, timeout: float | None) -> None:
        """folder: gets the stacks; timeout: seconds without progress, None watches nothing."""
        self.folder, self.timeout = folder, timeout
        self.step = 0
        self._factor = WARM_UP
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        reached("the start")
        if self.timeout is not None:
            # the main thread may hold the world's own connection while it waits
            store = dist.distributed_c10d._get_default_store().clone()
            self._store = dist.PrefixStore(f"watchdog/{next(_numbers)}", store)
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()

    def begin(self, step: int) -> None:
        """A step begins, counted from 1."""
        # the first one warms up
        self._factor = WARM_UP if self.step in (0, step) else 1
        self.step = step
        reached("the beginning of the step")

    def _watch(self) -> None:
        assert self.timeout is not None
        while not self._over.wait(min(10.0, self.timeout / 10)):
            _, since, allowed = _place
            is_late = time.monotonic() - since > max(self.timeout * self._factor, allowed)
            try:
                if is_late:
                    self._store.set("hung", str(dist.get_rank()))
                if is_late or self._store.check(["hung"]):
                    self._end()
            except RuntimeError as error:
                # the process that keeps the store is gone, and the launcher ends this one too
                if is_late:
                    self._dump(f"the other ranks can't be asked: {error}")
                    os._exit(HUNG)

    def _end(self) -> None:
        """Say where this rank is, have one rank say who is missing, and end the process."""
        rank, world = dist.get_rank(), dist.get_world_size()
        answer = self._answer()
        self._dump(f"rank {rank} on {answer.host}, step {answer.step}, {answer.phase}")
        self._store.set(f"rank/{rank}", json.dumps(asdict(answer)))
        names = [f"rank/{other}" for other in range(world)]
        self._wait_for(names)
        there = [other for other in range(world) if self._store.check([names[other]])]
        if rank == there[0]:
            answers = {r: Answer(**json.loads(self._store.get(names[r]))) for r in there}
            words = report(answers, world) + f"\nstacks are in {self.folder}\n"
            (self.folder / "hang.txt").write_text(words)
            os.write(2, words.encode())
            self._store.set("reported", "")
        # the launcher ends all ranks when the first has gone
        self._wait_for(["reported"])
        os._exit(HUNG)

    def _wait_for(self, names: list[str]) -> None:
        deadline = time.monotonic() + ANSWER_SECONDS
        while not self._store.check(names) and time.monotonic() < deadline:
            time.sleep(0.1)

    def _answer(self) -> Answer:
        phase, since, _ = _place
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        files, line = [], ""
        while frame is not None:
            file = Path(frame.f_code.co_filename)
            files.append(file)
            if not line and set(OUR_FOLDERS) & set(file.parts[-4:-1]):
                line = f"{'/'.join(file.parts[-3:])}:{frame.f_lineno} ({frame.f_code.co_name})"
            frame = frame.f_back
        waits = any(file.parts[-3:-1] == ("torch", "distributed") for file in files)
        seconds = time.monotonic() - since
        host = socket.gethostname()
        return Answer(host, os.getpid(), self.step, phase, seconds, waits, line, _collectives())

    def _dump(self, title: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"rank_{dist.get_rank()}.txt").open("w") as file:
            file.write(f"{title}\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)


def _collectives() -> dict[str, int]:
    """How many collectives this rank has entered in each of its groups."""
    found = {}
    for group in dist.distributed_c10d._world.pg_map:
        ranks = ",".join(map(str, dist.get_process_group_ranks(group)))
        found[f"{ranks}/{group.group_name}"] = group._get_sequence_number_for_group()
    return found


def report(answers: dict[int, Answer], world: int) -> str:
    """Who is missing, and where every rank is, in words."""
    absent = [rank for rank in range(world) if rank not in answers]
    behind = missing(answers)
    lines = [f"HUNG: no progress for {max(a.seconds for a in answers.values()):.0f} s."]
    for rank in behind:
        at = answers[rank]
        lines.append(
            f"MISSING rank {rank} on {at.host} (pid {at.pid}): step {at.step}, {at.phase}, "
            f"in {at.line or 'foreign code'}"
        )
    lines += [f"MISSING rank {rank}: its process does not answer" for rank in absent]
    if not behind and not absent:
        lines.append("no rank is behind the others: all wait for something outside")
    for rank, at in sorted(answers.items()):
        if rank not in behind:
            lines.append(
                f"rank {rank} on {at.host}: step {at.step}, {at.phase}, "
                f"{'waits for others ' if at.waits else ''}in {at.line or 'foreign code'}"
            )
    return "\n".join(lines)


def missing(answers: dict[int, Answer]) -> list[int]:
    """Ranks that others wait for, and which wait for none themselves.

    A rank that has entered fewer collectives of a group than another of its ranks holds that one
    up. Point-to-point waits are not counted: without such ranks it is those in an earlier step,
    then those that do not wait in a collective while others do.
    """
    ahead, behind = set[int](), set[int]()
    for name in {name for answer in answers.values() for name in answer.collectives}:
        entered = {r: a.collectives[name] for r, a in answers.items() if name in a.collectives}
        for rank, number in entered.items():
            if number < max(entered.values()):
                behind.add(rank)
            elif number > min(entered.values()):
                ahead.add(rank)
    last = max(answer.step for answer in answers.values())
    waiting = {rank for rank, answer in answers.items() if answer.waits}
    for found in (
        behind - ahead,
        behind,
        {rank for rank, answer in answers.items() if answer.step < last},
        set(answers) - waiting if waiting else set[int](),
    ):
        if found:
            return sorted(found)
    return []
