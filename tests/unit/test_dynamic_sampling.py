"""Groups that teach something, over steps, checkpoints and the end of the data."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from prism_megatron.data.sources import Source
from prism_megatron.data.stream import BatchStream, Quarantine
from prism_megatron.objectives.rewards.types import Reward
from prism_megatron.training.dynamic_sampling import DynamicSampler, Group
from prism_megatron.training.loop import EndOfData
from prism_megatron.types import Prompt, Rollout


@dataclass(frozen=True)
class Task:
    prompt: Prompt


class Numbers:
    """A data file with `size` rows."""

    source = Path("numbers")

    path = Path("numbers")

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        return index

    def row_id(self, index: int) -> str:
        return f"numbers:{index}"


def task_of(name: str) -> Task:
    return Task(Prompt(name, (1,), ()))


def sampler(
    tmp_path: Path,
    size: int,
    teaches: Callable[[int], bool],
    gen_batch_size: int,
    **options: Any,
) -> DynamicSampler[Task]:
    """Batches of three groups; row i has right and wrong answers where teaches(i)."""
    stream: BatchStream[int, Task] = BatchStream(
        [Source("numbers", [Numbers(size)])],
        lambda i: task_of(f"numbers:{i}"),
        Quarantine(tmp_path / "q", 1.0),
        batch_size=gen_batch_size,
        seed=3,
    )

    def sample(tasks: list[Task], step: int) -> list[Group[Task]]:
        return [group(task, step) for task in tasks]

    def group(task: Task, step: int) -> Group[Task]:
        second = float(not teaches(int(task.prompt.row_id.split(":")[1])))
        rollouts = [Rollout((step, 7), (-0.1, -1 / 3), "stop", step)] * 2
        return Group(
            task, rollouts, [Reward(1.0, 1.0, 1.0, "number"), Reward(second, second, 1.0, "number")]
        )

    return DynamicSampler(
        stream,
        sample,
        **{"batch_size": 3, "filtered": True, "num_rows": size, "max_epochs": None, **options},
    )


def names(groups: list[Group[Task]]) -> list[str]:
    return [group.task.prompt.row_id for group in groups]


def test_a_step_is_filled_and_the_surplus_is_the_next_ones(tmp_path: Path) -> None:
    found = sampler(tmp_path, 40, lambda i: i % 2 == 0, gen_batch_size=8)
    order = names(sampler(tmp_path, 40, bool, 40, batch_size=40, filtered=False).next_batch(0)[0])
    wanted = [name for name in order if int(name.split(":")[1]) % 2 == 0]
    batches, rounds = [], []
    for step in range(5):
        batch, sampled = found.next_batch(step)
        assert len(batch) == 3 and all(group.differs for group in batch)
        batches += names(batch)
        rounds.append(len(sampled) // 8)
        if not sampled:
            assert batch[0].rollouts[0].weight_version < step
    assert batches == wanted[:15]
    assert sum(rounds) * 8 == found.stream.position and 0 in rounds


def test_without_filter_every_group_is_taken_as_it_comes(tmp_path: Path) -> None:
    found = sampler(tmp_path, 9, lambda i: False, gen_batch_size=3, filtered=False)
    batch, sampled = found.next_batch(0)
    assert batch == sampled and len(batch) == 3 and found.waiting == []


def test_waiting_groups_come_through_a_checkpoint(tmp_path: Path) -> None:
    def fresh() -> DynamicSampler[Task]:
        return sampler(tmp_path, 40, lambda i: i % 3 > 0, gen_batch_size=10)

    first, second = fresh(), fresh()
    first.next_batch(0)
    saved = json.loads(json.dumps(first.state_dict()))
    assert len(saved["waiting"]) > 0
    second.stream.restore(first.stream.state)
    second.load_state_dict(saved, task_of)
    for step in range(1, 4):
        assert second.next_batch(step) == first.next_batch(step)


def test_a_pass_that_does_not_fill_a_step_ends_the_data(tmp_path: Path) -> None:
    found = sampler(tmp_path, 12, lambda i: i in (4, 7), gen_batch_size=4)
    with pytest.raises(EndOfData, match=r"12 rows did not fill a step: 2 of the 3 groups"):
        found.next_batch(0)
    assert found.stream.position == 12


def test_the_number_of_passes_is_bounded(tmp_path: Path) -> None:
    found = sampler(tmp_path, 6, lambda i: True, gen_batch_size=3, max_epochs=2)
    for step in range(4):
        found.next_batch(step)
    with pytest.raises(EndOfData, match=r"max_epochs=2 passes over the data's 6 rows are made"):
        found.next_batch(4)
