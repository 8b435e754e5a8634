"""Batches of one source and of blends, their state, threads, and the quarantine."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from prism_megatron.data.rows import RowError
from prism_megatron.data.stream import BatchStream, Quarantine, convert_all


class Numbers:
    """A source of the numbers first to first + count - 1, some of which can't be read."""

    def __init__(
        self,
        count: int,
        bad: tuple[int, ...] = (),
        name: str = "numbers",
        weight: float = 1.0,
        first: int = 0,
    ):
        self.name = name
        self.count, self.bad, self.weight, self.first = count, bad, weight, first

    def __len__(self) -> int:
        return self.count

    def row_id(self, index: int) -> str:
        return f"{self.name}:{index}"

    def place(self, index: int) -> tuple[Any, int]:
        return SimpleNamespace(path=Path(f"{self.name}.json")), index + self.first

    def __getitem__(self, index: int) -> int:
        if index in self.bad:
            raise RowError(f"bad number: {index}")
        return self.first + index


def stream(
    sources: Numbers | list[Numbers],
    tmp_path: Path,
    share: float = 0.5,
    convert: Callable[[int], Any] = lambda number: number * 10,
    **kwargs: int,
) -> BatchStream[Any, Any]:
    quarantine = Quarantine(tmp_path / "q.jsonl", share)
    options = {"batch_size": 3, "seed": 1} | kwargs
    listed: Any = sources if isinstance(sources, list) else [sources]
    return BatchStream(listed, convert, quarantine, **options)


def test_quarantine_writes_counts_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "run" / "quarantine.jsonl"
    a: Any = Numbers(8, name="a")
    b: Any = Numbers(8, name="b", first=100)
    first = Quarantine(path, 0.5)
    assert first.summary() == "0 rows quarantined"
    first.add(a, 1, "overlong prompt: 9 tokens")
    first.add(a, 2, "overlong prompt: 8 tokens")
    first.add(a, 2, "overlong prompt: 8 tokens")
    assert "2 rows quarantined (overlong prompt: 2), listed" in first.summary()
    again = Quarantine(path, 0.5)
    again.add(a, 2, "overlong prompt: 8 tokens")
    again.add(b, 2, "missing image: x.png")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["row"] for line in lines] == ["a:1", "a:2", "b:2"]
    place = {"file": "b.json", "index": 102}
    assert lines[2] == {"row": "b:2", "source": "b", **place, "reason": "missing image: x.png"}
    assert again.total == 3
    assert again.counts == {"a": {"overlong prompt": 2}, "b": {"missing image": 1}}
    assert "3 rows quarantined (a: overlong prompt: 2; b: missing image: 1)" in again.summary()


def test_quarantine_goes_on_after_a_line_that_a_full_disk_cut(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    rows: Any = Numbers(8, name="a")
    Quarantine(path, 0.5).add(rows, 1, "missing image: x.png")
    with path.open("a") as file:
        file.write('{"row": "a:2", "sou')
    assert Quarantine(path, 0.5, write=False).total == 1
    again = Quarantine(path, 0.5)
    again.add(rows, 2, "missing image: y.png")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["row"] for line in lines] == ["a:1", "a:2"]


def test_quarantine_stops_a_run_with_too_many_bad_rows_of_one_source(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path / "q.jsonl", 0.1, write=False)
    a: Any = Numbers(10, name="a")
    b: Any = Numbers(9, name="b")
    quarantine.add(a, 1, "missing image: x.png")
    message = r"1 of 9 rows of b.*max_bad_share=0\.1.*missing image: 1"
    with pytest.raises(ValueError, match=message):
        quarantine.add(b, 1, "missing image: y.png")
    assert not (tmp_path / "q.jsonl").exists()


def test_stream_gives_every_row_once_an_epoch_in_a_new_order(tmp_path: Path) -> None:
    batches = stream(Numbers(12), tmp_path)
    epochs = [[n for _ in range(4) for n in batches.next_batch()] for _ in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == [n * 10 for n in range(12)]
    assert epochs[0] != epochs[1]
    assert stream(Numbers(12), tmp_path).next_batch() == epochs[0][:3]
    assert stream(Numbers(12), tmp_path, seed=2).next_batch() != epochs[0][:3]


@pytest.mark.parametrize("num_workers", [0, 3])
def test_the_order_of_one_source_is_that_of_earlier_versions(
    tmp_path: Path, num_workers: int
) -> None:
    """Written down once, so that a published run can be repeated."""
    batches = stream(Numbers(10, bad=(4,)), tmp_path, num_workers=num_workers)
    assert [batches.next_batch() for _ in range(5)] == EARLIER


EARLIER = [[80, 70, 0], [10, 20, 50], [90, 60, 30], [70, 20, 60], [10, 0, 30]]


@pytest.mark.parametrize("num_workers", [0, 3])
def test_stream_fills_batches_past_bad_rows(tmp_path: Path, num_workers: int) -> None:
    rows = Numbers(10, bad=(2, 5))
    batches = stream(rows, tmp_path, batch_size=4, num_workers=num_workers)
    drawn = [batches.next_batch() for _ in range(6)]
    assert all(len(batch) == 4 for batch in drawn)
    assert {n for batch in drawn for n in batch} == {n * 10 for n in range(10)} - {20, 50}
    assert len((tmp_path / "q.jsonl").read_text().splitlines()) == 2


def blend() -> list[Numbers]:
    return [
        Numbers(40, name="a", weight=3, bad=(7, 8)),
        Numbers(11, name="b", weight=1.5, first=1000),
        Numbers(7, name="c", weight=0.5, first=2000, bad=(3,)),
    ]


def name_of(number: int) -> str:
    return "abc"[number // 1000]


def test_a_blend_has_its_shares_at_every_moment_whatever_is_bad(tmp_path: Path) -> None:
    batches = stream(blend(), tmp_path, convert=int, batch_size=7)
    seen: Counter[str] = Counter()
    for _ in range(60):
        batch = batches.next_batch()
        assert len(batch) == 7
        seen.update(map(name_of, batch))
        for name, share in {"a": 0.6, "b": 0.3, "c": 0.1}.items():
            assert abs(seen[name] - share * seen.total()) <= 1


def test_sources_of_a_blend_have_epochs_of_their_own(tmp_path: Path) -> None:
    batches = stream(blend(), tmp_path, convert=int, batch_size=7)
    numbers = [n for _ in range(40) for n in batches.next_batch()]
    for name, usable in {"a": 38, "b": 11, "c": 6}.items():
        own = [n for n in numbers if name_of(n) == name]
        epochs = [own[i : i + usable] for i in range(0, len(own) - usable + 1, usable)]
        assert abs(batches.epochs[name] - len(own) / usable) <= 1
        assert len(epochs) >= 4 and all(len(set(epoch)) == usable for epoch in epochs)
        assert epochs[0] != epochs[1]


def test_two_equally_long_sources_have_orders_of_their_own(tmp_path: Path) -> None:
    sources = [Numbers(30, name="a"), Numbers(30, name="b", first=1000)]
    batch = stream(sources, tmp_path, convert=int, batch_size=60).next_batch()
    first, second = ([n % 1000 for n in batch if name_of(n) == name] for name in "ab")
    assert sorted(first) == sorted(second) and first != second


@pytest.mark.parametrize("stopped", [0, 2])
@pytest.mark.parametrize("resumed", [0, 2])
def test_a_stream_goes_on_with_the_very_next_batch(
    tmp_path: Path, stopped: int, resumed: int
) -> None:
    """Threads had gone further when the state was taken, and its JSON is all that is left."""
    whole = stream(blend(), tmp_path, convert=int, batch_size=5, num_workers=stopped)
    for count in range(1, 12):
        whole.next_batch()
        state = json.loads(json.dumps(whole.state))
        other = stream(blend(), tmp_path, convert=int, batch_size=5, num_workers=resumed)
        other.restore(state)
        assert other.state == state
        rest = stream(blend(), tmp_path, convert=int, batch_size=5)
        want = [rest.next_batch() for _ in range(count + 3)][count:]
        assert [other.next_batch() for _ in range(3)] == want
    assert state["a"]["drawn"] - state["a"]["used"] <= 2 < state["a"]["used"]


def test_a_stream_refuses_the_state_of_other_data(tmp_path: Path) -> None:
    state = stream(Numbers(10), tmp_path).state
    with pytest.raises(ValueError, match=r"\{'numbers': 10\}, the configuration has \{'numb"):
        stream(Numbers(9), tmp_path).restore(state)
    with pytest.raises(ValueError, match="'other': 10"):
        stream(Numbers(10, name="other"), tmp_path).restore(state)


def test_the_next_batch_is_made_while_this_one_is_used(tmp_path: Path) -> None:
    converted: list[int] = []
    together = threading.Barrier(3, timeout=20)

    def convert(number: int) -> int:
        # passes only if three threads are in it at once
        together.wait()
        converted.append(number)
        return number

    batches = stream(Numbers(12), tmp_path, convert=convert, num_workers=3)
    batches.next_batch()
    deadline = time.monotonic() + 20
    while len(converted) < 6 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(converted) == 6, "nobody asked for the second batch yet"
    assert batches.state["numbers"]["drawn"] == batches.position == 3


@pytest.mark.parametrize("num_workers", [0, 2])
def test_stream_stops_when_too_many_rows_are_bad(tmp_path: Path, num_workers: int) -> None:
    rows = Numbers(10, bad=(1, 2, 3))
    batches = stream(rows, tmp_path, share=0.2, num_workers=num_workers)
    with pytest.raises(ValueError, match="3 of 10 rows of numbers can't be used"):
        for _ in range(10):
            batches.next_batch()


def test_stream_ends_when_no_row_of_a_source_is_left(tmp_path: Path) -> None:
    sources = [Numbers(5, name="good"), Numbers(2, name="empty", bad=(0, 1))]
    with pytest.raises(ValueError, match="no row of empty"):
        stream(sources, tmp_path, share=1.0).next_batch()


class Ranks:
    """Threads that ask quarantines of their own as ranks do: each gets what all have found."""

    def __init__(self, count: int):
        self.found: list[Any] = [None] * count
        self.rounds = 0
        self._all = threading.Barrier(count, timeout=20)

    def gather(self, rank: int) -> Callable[[Any], list[Any]]:
        def gather(bad: Any) -> list[Any]:
            self.found[rank] = bad
            if self._all.wait() == 0:
                self.rounds += 1
            found = list(self.found)
            self._all.wait()
            return found

        return gather


def of_ranks(work: Callable[[int, Any], Any], count: int = 3) -> tuple[list[Any], Ranks]:
    ranks = Ranks(count)
    with ThreadPoolExecutor(count) as threads:
        asked = [threads.submit(work, rank, ranks.gather(rank)) for rank in range(count)]
        return [future.result(20) for future in asked], ranks


@pytest.mark.parametrize("num_workers", [0, 2])
def test_what_one_rank_cannot_read_is_bad_for_all(tmp_path: Path, num_workers: int) -> None:
    """Rank 1 alone can't read some rows, and rank 2 others, one of which comes only where the
    first is left out."""
    unread = {0: (2,), 1: (2, 7, 1003), 2: (2, 11, 30)}

    def batches(rank: int, gather: Any) -> Any:
        def convert(number: int) -> int:
            if number in unread[rank]:
                raise RowError(f"missing image: {number}.png")
            return number

        quarantine = Quarantine(tmp_path / f"{rank}.jsonl", 0.5, gather=gather)
        listed: Any = [Numbers(40, name="a", weight=3), Numbers(11, name="b", first=1000)]
        options = {"batch_size": 5, "seed": 1, "num_workers": num_workers}
        drawn = BatchStream[Any, int](listed, convert, quarantine, **options)
        given = [drawn.next_batch() for _ in range(20)]
        return given, drawn.state, quarantine.counts

    found, ranks = of_ranks(batches)
    assert found[0] == found[1] == found[2] and ranks.rounds > 20
    given, _, counts = found[0]
    assert all(len(batch) == 5 for batch in given)
    seen = {number for batch in given for number in batch}
    assert seen == {*range(40), *range(1000, 1011)} - {2, 7, 11, 30, 1003}
    assert {name: count.total() for name, count in counts.items()} == {"a": 4, "b": 1}
    lines = [(tmp_path / f"{rank}.jsonl").read_text() for rank in range(3)]
    assert lines[0] == lines[1] == lines[2]
    reasons = {line["row"]: line["reason"] for line in map(json.loads, lines[0].splitlines())}
    assert reasons["a:2"] == "missing image: 2.png"
    assert reasons["b:3"] == "missing image: 1003.png (on ranks [1] of 3 alone)"


def test_ranks_that_read_alike_ask_each_other_once_a_batch(tmp_path: Path) -> None:
    def batches(rank: int, gather: Any) -> None:
        quarantine = Quarantine(tmp_path / f"{rank}.jsonl", 0.5, gather=gather)
        listed: Any = [Numbers(40, bad=(3, 4))]
        drawn = BatchStream[Any, int](listed, int, quarantine, batch_size=4, seed=1)
        for _ in range(12):
            drawn.next_batch()

    assert of_ranks(batches)[1].rounds == 12


def test_all_ranks_convert_what_all_can_read(tmp_path: Path) -> None:
    def converted(rank: int, gather: Any) -> list[str]:
        quarantine = Quarantine(tmp_path / f"{rank}.jsonl", 0.6, gather=gather)
        sources: Any = [Numbers(5, bad=(rank,)), Numbers(2, name="more", first=1000)]
        return convert_all(sources, str, quarantine)

    assert of_ranks(converted)[0] == [["3", "4", "1000", "1001"]] * 3


def test_too_many_rows_that_one_rank_cannot_read_stop_all(tmp_path: Path) -> None:
    def batches(rank: int, gather: Any) -> str:
        quarantine = Quarantine(tmp_path / f"{rank}.jsonl", 0.1, gather=gather)
        listed: Any = [Numbers(40, bad=tuple(range(40)) if rank == 2 else ())]
        drawn = BatchStream[Any, int](listed, int, quarantine, batch_size=4, seed=1)
        with pytest.raises(ValueError, match="5 of 40 rows of numbers can't be used") as error:
            drawn.next_batch()
        return str(error.value).split(";")[0]

    found, _ = of_ranks(batches)
    assert found[0] == found[1] == found[2]


def test_convert_all_keeps_file_order(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path / "q.jsonl", 0.5)
    sources: Any = [Numbers(5, bad=(1,)), Numbers(2, name="more", first=1000)]
    assert convert_all(sources, str, quarantine) == ["0", "2", "3", "4", "1000", "1001"]
    assert quarantine.counts == {"numbers": {"bad number": 1}}
