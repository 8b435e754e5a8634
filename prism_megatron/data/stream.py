"""Batches from one or several sources, and what happens to rows that can't be used.

    source i --permutation of its epoch--> rows --convert--> usable ones --+
    source j -- ...                                                         +--> batches
             the next row is of the source that is furthest below its share-+
                      (threads convert the next batch while this one is used)
    bad rows of this rank --gather--> those of all ranks: the same? --yes--> quarantine
                                   the batch once more without them <--no-+

Every rank draws the same batches; how a batch is shared out among ranks is decided after that, so
the stream does not depend on the number of ranks. All its state is a few counters. A file that one
rank alone can't read is bad for all of them.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prism_megatron.data.rows import Row, RowError
from prism_megatron.data.sources import Source

Bad = dict[tuple[int, int], str]
"""(source, row) that can't be used -> why."""


class Quarantine:
    """Rows that can't be used: each written once with its reason, counted, and limited in share.

    path: JSON lines {row, source, file, index, reason}; a run that goes on keeps what is already
    there. counts: by source, how many rows were put there for which kind of reason.
    write: False on all ranks but one, which then count alike without writing.
    gather: what every rank gives, in the order of ranks.
    """

    def __init__(
        self,
        path: Path,
        max_bad_share: float,
        *,
        write: bool = True,
        gather: Callable[[Bad], list[Bad]] = lambda bad: [bad],
    ):
        self.path, self._gather = path, gather
        self._write = write
        self.max_bad_share = max_bad_share
        self.counts: dict[str, Counter[str]] = {}
        self._seen: set[tuple[str, str]] = set()
        if path.exists():
            if write:
                drop_half_line(path)
            for line in path.read_text().splitlines(keepends=True):
                if not line.endswith("\n"):
                    continue
                entry = json.loads(line)
                self._count(entry["row"], entry["source"], entry["reason"])

    @property
    def total(self) -> int:
        """Distinct rows quarantined."""
        return len(self._seen)

    def agree(self, bad: Bad) -> tuple[Bad, bool]:
        """What any rank found to be bad, and whether all found the same; every rank has to ask."""
        found = self._gather(bad)
        merged: Bad = {}
        for place in sorted({place for one in found for place in one}):
            ranks = [rank for rank, one in enumerate(found) if place in one]
            merged[place] = found[ranks[0]][place]
            if len(ranks) < len(found):
                merged[place] += f" (on ranks {ranks} of {len(found)} alone)"
        return merged, all(one.keys() == merged.keys() for one in found)

    def allows(self, source: Source[Any], count: int) -> bool:
        """Whether so many rows of a source may be bad."""
        return count <= self.max_bad_share * len(source)

    def add(self, source: Source[Any], index: int, reason: str) -> None:
        """Record a row; one that is already recorded is not counted again.

        ValueError if more than the allowed share of its source's rows is bad now.
        """
        row_id, name = source.row_id(index), source.name
        if self._count(row_id, name, reason) and self._write:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file, place = source.place(index)
            entry = {"row": row_id, "source": name, "file": str(file.path), "index": place}
            append_line(self.path, entry | {"reason": reason})
        bad = self.counts[name].total()
        if not self.allows(source, bad):
            raise ValueError(
                f"{bad} of {len(source)} rows of {name} can't be used, more than "
                f"data.max_bad_share={self.max_bad_share:g} allows: "
                f"{_reasons(self.counts[name])}; see {self.path}"
            )

    def summary(self) -> str:
        """One line for the end of a run."""
        if not self.total:
            return "0 rows quarantined"
        parts = [
            (f"{source}: " if len(self.counts) > 1 else "") + _reasons(counts)
            for source, counts in self.counts.items()
        ]
        return f"{self.total} rows quarantined ({'; '.join(parts)}), listed in {self.path}"

    def _count(self, row_id: str, source: str, reason: str) -> bool:
        if (source, row_id) in self._seen:
            return False
        self._seen.add((source, row_id))
        # Up to the first colon a reason is its kind; after it stand the row's own numbers.
        self.counts.setdefault(source, Counter())[reason.split(":")[0]] += 1
        return True


def append_line(path: Path, entry: object) -> None:
    """Add a JSON line, by one write to a file opened for appending: a kill leaves whole lines."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(handle, f"{json.dumps(entry)}\n".encode())
    finally:
        os.close(handle)


def drop_half_line(path: Path) -> None:
    """Cut off what a disk that was full has left of a last line."""
    with path.open("rb+") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)


def _reasons(counts: Counter[str]) -> str:
    return ", ".join(f"{reason}: {count}" for reason, count in counts.most_common())


def convert_all[R: Row, T](
    sources: Sequence[Source[R]], convert: Callable[[R], T], quarantine: Quarantine
) -> list[T]:
    """Every usable row of every source, converted, in the order of the files; every rank has to
    ask."""
    converted: dict[tuple[int, int], T] = {}
    bad: Bad = {}
    for number, source in enumerate(sources):
        failed = 0
        for index in range(len(source)):
            try:
                converted[number, index] = convert(source[index])
            except RowError as error:
                bad[number, index] = str(error)
                failed += 1
                if not quarantine.allows(source, failed):
                    break
    bad, _ = quarantine.agree(bad)
    for (number, index), reason in bad.items():
        quarantine.add(sources[number], index, reason)
    return [value for place, value in converted.items() if place not in bad]


@dataclass(frozen=True)
class Counters:
    """How far a stream is in one source.

    rows: of the source, by which a changed file is told. drawn: rows taken so far, those that could
    not be used included; drawn // rows is the epoch. used: rows that came into batches. failed:
    rows since the last usable one.
    """

    rows: int
    drawn: int = 0
    used: int = 0
    failed: int = 0


@dataclass(frozen=True)
class Made[T]:
    """A batch, the counters after it, and the rows on the way that this rank can't use."""

    batch: list[T]
    counters: tuple[Counters, ...]
    bad: Bad


class BatchStream[R: Row, T]:
    """Endless batches of converted rows, each source reshuffled at each of its epochs.

    An epoch of a source is each of its rows once, in an order that follows from the seed; sources
    come to the end of their epochs independently of each other, and begin the next one. The share
    of a source in the rows that come into batches is its weight over the sum of weights, exact to
    one row at every moment. A row that can't be used is quarantined and the next one of its source
    takes its place, so every batch is full.

    num_workers: threads that convert the next batch while the caller is busy with the last; with 0
    a batch is made when it is asked for. `state` is that after the batch handed out last, so a
    stream that is given it goes on with the very next one, wherever the threads were.
    """

    def __init__(
        self,
        sources: Sequence[Source[R]],
        convert: Callable[[R], T],
        quarantine: Quarantine,
        *,
        batch_size: int,
        seed: int,
        num_workers: int = 0,
    ):
        self._sources = list(sources)
        self._convert = convert
        self._quarantine = quarantine
        self._batch_size = batch_size
        self._counters = tuple(Counters(len(source)) for source in sources)
        total = sum(source.weight for source in sources)
        self._shares = [source.weight / total for source in sources]

        @lru_cache(maxsize=len(self._sources))
        def order(number: int, epoch: int) -> NDArray[np.int64]:
            # a last zero does not change numpy's generator: the first source has (seed, epoch)
            rng = np.random.default_rng((seed, epoch, number))
            return rng.permutation(len(self._sources[number]))

        self._order = order
        self._ahead: Future[Made[T]] | None = None
        self._maker = ThreadPoolExecutor(1, "batches") if num_workers else None
        self._workers = ThreadPoolExecutor(num_workers, "rows") if num_workers else None

    @property
    def state(self) -> dict[str, dict[str, int]]:
        """The counters of each source by its name, as JSON takes them."""
        return {
            source.name: asdict(counters)
            for source, counters in zip(self._sources, self._counters, strict=True)
        }

    @property
    def epochs(self) -> dict[str, float]:
        """How often each source was passed, by its name."""
        return {name: counters["drawn"] / counters["rows"] for name, counters in self.state.items()}

    @property
    def position(self) -> int:
        """Rows drawn for the batches so far, of all sources."""
        return sum(counters.drawn for counters in self._counters)

    def restore(self, state: dict[str, dict[str, int]]) -> None:
        """Go on from a `state`; ValueError if it is of other sources than these."""
        found = {name: counters["rows"] for name, counters in state.items()}
        if found != (wanted := {source.name: len(source) for source in self._sources}):
            raise ValueError(
                f"the checkpoint was taken with the sources (rows) {found}, the configuration has "
                f"{wanted}; give it the same data, or start a new run.dir from the exported model"
            )
        self._ahead = None
        self._counters = tuple(Counters(**state[source.name]) for source in self._sources)

    def next_batch(self) -> list[T]:
        """The next `batch_size` usable rows, the same on every rank, all of which have to ask;
        ValueError when too many rows can't be used."""
        ahead, self._ahead = self._ahead, None
        made = ahead.result() if ahead else self._make(self._counters, {})
        known: Bad = {}
        while True:
            bad, same = self._quarantine.agree(made.bad)
            if same:
                break
            known |= bad
            made = self._make(self._counters, known)
        for (number, index), reason in bad.items():
            self._quarantine.add(self._sources[number], index, reason)
        for source, counters in zip(self._sources, made.counters, strict=True):
            if counters.failed > 2 * len(source):
                raise ValueError(f"no row of {source.name} can be used")
        self._counters = made.counters
        if self._maker is not None:
            self._ahead = self._maker.submit(self._make, self._counters, {})
        return made.batch

    def _make(self, counters: tuple[Counters, ...], known: Bad) -> Made[T]:
        """The batch that comes after `counters`, without rows that are known to be bad; too short
        if more are bad than the quarantine allows."""
        states = list(counters)
        batch: list[T] = []
        bad: Bad = {}
        failed: Counter[int] = Counter()
        while len(batch) < self._batch_size:
            drawn = [self._draw(states) for _ in range(self._batch_size - len(batch))]
            for place, result in zip(drawn, self._results(drawn, known), strict=True):
                number = place[0]
                if not isinstance(result, RowError):
                    batch.append(result)
                    states[number] = replace(states[number], failed=0)
                    continue
                source, state = self._sources[number], states[number]
                states[number] = replace(state, used=state.used - 1, failed=state.failed + 1)
                failed[number] += place not in bad
                bad[place] = str(result)
                allowed = self._quarantine.allows(source, failed[number])
                if not allowed or state.failed > 2 * len(source):
                    return Made(batch, tuple(states), bad)
        return Made(batch, tuple(states), bad)

    def _draw(self, states: list[Counters]) -> tuple[int, int]:
        """(source, row) that comes next, counted in `states` as if it can be used."""
        total = 1 + sum(state.used for state in states)
        behind = [
            share * total - state.used for share, state in zip(self._shares, states, strict=True)
        ]
        number = behind.index(max(behind))
        state = states[number]
        epoch, offset = divmod(state.drawn, state.rows)
        states[number] = replace(state, drawn=state.drawn + 1, used=state.used + 1)
        return number, int(self._order(number, epoch)[offset])

    def _results(self, drawn: list[tuple[int, int]], known: Bad) -> list[T | RowError]:
        """Each row converted, or why it can't be used, in order."""
        convert = partial(self._result, known)
        return list((self._workers.map if self._workers else map)(convert, drawn))

    def _result(self, known: Bad, place: tuple[int, int]) -> T | RowError:
        if place in known:
            return RowError(known[place])
        number, index = place
        try:
            return self._convert(self._sources[number][index])
        except RowError as error:
            return error
