"""Groups that teach something, over steps, checkpoints and the end of the data."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from prism_megatron.config import schema
from prism_megatron.config.schema import Sampling
from prism_megatron.data.rows import Row
from prism_megatron.data.sources import Source
from prism_megatron.data.stream import BatchStream, Quarantine
from prism_megatron.objectives.rewards.types import Reward
from prism_megatron.rollout.sampler import Sampler, rollouts_of, stale_share, state_of
from prism_megatron.training.dynamic_sampling import Batch, DynamicSampler, Group
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

    def __getitem__(self, index: int) -> Row:
        return Row(str(index), (), ())


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
    stream: BatchStream[Row, Task] = BatchStream(
        [Source("numbers", [Numbers(size)])],
        lambda row: task_of(row.row_id),
        Quarantine(tmp_path / "q", 1.0),
        batch_size=gen_batch_size,
        seed=3,
    )

    def reward(answered: list[tuple[Task, list[Rollout]]]) -> list[Group[Task]]:
        return [group(*each) for each in answered]

    def group(task: Task, rollouts: list[Rollout]) -> Group[Task]:
        second = float(not teaches(int(task.prompt.row_id.split(":")[1])))
        return Group(
            task, rollouts, [Reward(1.0, 1.0, 1.0, "number"), Reward(second, second, 1.0, "number")]
        )

    mode = options.pop("mode", "synchronous")
    rollout = schema.Rollout(kind="local", **MODES[mode])
    bounds = {"max_epochs": None, "max_staleness": None, "steps": 100}
    return DynamicSampler(
        Sampler(stream, cast(Any, Engines(rollout.partial)), Sampling(n=2), rollout),
        reward,
        **{"batch_size": 3, "filtered": True, "num_rows": size, **bounds, **options},
    )


MODES: dict[str, dict[str, bool]] = {
    "synchronous": {},
    "ahead": {"ahead": True},
    "partial": {"ahead": True, "partial": True},
}


class Engines:
    """What of a fleet a sampler uses; answers with the step and the weights of when it is asked."""

    weight_version = -1

    def __init__(self, partial: bool) -> None:
        self.partial = partial
        self.out: list[list[Rollout]] = []

    def submit(self, prompts: Sequence[Prompt], sampling: Sampling, step: int) -> None:
        assert not self.out and self.weight_version >= 0
        answer = Rollout((step, 7), (-0.1, -1 / 3), "stop", self.weight_version)
        self.out = [[answer] * sampling.n for _ in prompts]

    def collect(self, version: int) -> list[list[Rollout]]:
        answers, self.out = self.out, []
        return answers

    def sync(self, version: int) -> dict[str, float]:
        assert self.partial or not self.out, "new weights while prompts are out"
        # the second token comes with the new weights
        self.out = [
            [replace(r, weight_version=version, earlier=((self.weight_version, 1),)) for r in group]
            for group in self.out
        ]
        self.weight_version = version
        return {}


def steps(found: DynamicSampler[Task], numbers: Iterable[int]) -> Iterator[Batch[Task]]:
    """A run's batches, each with the weights of its number."""
    for step in numbers:
        if found.sampler.engine.weight_version < step:
            found.sampler.sync(step)
        yield found.next_batch(step)
    found.sampler.sync(step + 1)


def names(groups: list[Group[Task]]) -> list[str]:
    return [group.task.prompt.row_id for group in groups]


def test_a_step_is_filled_and_the_surplus_is_the_next_ones(tmp_path: Path) -> None:
    found = sampler(tmp_path, 40, lambda i: i % 2 == 0, gen_batch_size=8)
    whole = sampler(tmp_path, 40, bool, 40, batch_size=40, filtered=False)
    [every] = steps(whole, [0])
    order = names(every.groups)
    wanted = [name for name in order if int(name.split(":")[1]) % 2 == 0]
    batches, rounds = [], []
    for step, batch in enumerate(steps(found, range(5))):
        assert len(batch.groups) == 3 and all(group.differs for group in batch.groups)
        batches += names(batch.groups)
        rounds.append(len(batch.sampled) // 8)
        if not batch.sampled:
            assert batch.groups[0].rollouts[0].weight_version < step
    assert batches == wanted[:15]
    assert sum(rounds) * 8 == found.sampler.stream.position and 0 in rounds


def test_without_filter_every_group_is_taken_as_it_comes(tmp_path: Path) -> None:
    found = sampler(tmp_path, 9, lambda i: False, gen_batch_size=3, filtered=False)
    [batch] = steps(found, [0])
    assert batch.groups == batch.sampled and len(batch.groups) == 3 and found.waiting == []


@pytest.mark.parametrize("mode", MODES)
def test_what_is_sampled_comes_through_a_checkpoint(tmp_path: Path, mode: str) -> None:
    def fresh() -> DynamicSampler[Task]:
        return sampler(tmp_path, 40, lambda i: i % 3 > 0, gen_batch_size=10, mode=mode)

    first, second = fresh(), fresh()
    list(steps(first, [0]))
    saved = json.loads(json.dumps(first.state_dict()))
    assert len(saved["waiting"]) > 0
    assert len(saved["ready"]) == (0 if mode == "synchronous" else 10)
    second.sampler.stream.restore(first.sampler.stream.state)
    second.load_state_dict(saved, task_of)
    assert list(steps(second, range(1, 6))) == list(steps(first, range(1, 6)))


def test_a_sync_does_not_wait_for_what_is_sampled(tmp_path: Path) -> None:
    options = {"gen_batch_size": 3, "filtered": False, "steps": 3}
    found = list(steps(sampler(tmp_path, 12, bool, mode="partial", **options), range(3)))
    versions = [batch.groups[0].rollouts[0].token_versions for batch in found]
    assert versions == [(0, 0), (0, 1), (1, 2)]
    shares = [stale_share(batch.groups[0].rollouts, step) for step, batch in enumerate(found)]
    assert shares == [0, 0.5, 0.5]


def test_a_rollout_comes_through_json() -> None:
    routes = torch.randint(200, (5, 6), dtype=torch.int16)
    plain = Rollout((3, 1), (-0.1, -1 / 3), "length", 4)
    [same, routed] = rollouts_of(
        json.loads(json.dumps([state_of(plain), state_of(replace(plain, routes=routes))]))
    )
    assert same == plain == routed and same.routes is None
    assert routed.routes is not None and torch.equal(routed.routes, routes)


def test_a_batch_is_sampled_while_the_one_before_trains(tmp_path: Path) -> None:
    """And none for a step that does not come."""
    options = {"gen_batch_size": 3, "filtered": False, "steps": 4}
    ahead = sampler(tmp_path, 12, bool, mode="ahead", **options)
    found = list(steps(ahead, range(4)))
    plain = list(steps(sampler(tmp_path, 12, bool, **options), range(4)))
    assert [names(batch.groups) for batch in found] == [names(batch.groups) for batch in plain]
    versions = [batch.groups[0].rollouts[0].weight_version for batch in found]
    assert versions == [0, 0, 1, 2]
    # random numbers are those of the step that a batch is for
    assert [batch.groups[0].rollouts[0].ids[0] for batch in found] == [0, 1, 2, 3]
    assert not ahead.sampler.has_drawn and ahead.sampler.stream.position == 12
    stale = [stale_share(batch.groups[0].rollouts, step) for step, batch in enumerate(found)]
    assert stale == [0, 1, 1, 1]


@pytest.mark.parametrize("bound, oldest", [(None, 3), (1, 1), (0, 0)])
def test_groups_that_are_too_old_are_left_out(
    tmp_path: Path, bound: int | None, oldest: int
) -> None:
    """Of twelve groups at once, three a step."""
    found = sampler(tmp_path, 48, lambda i: True, gen_batch_size=12, max_staleness=bound)
    batches = list(steps(found, range(8)))
    ages = [step - b.groups[0].rollouts[0].weight_version for step, b in enumerate(batches)]
    assert max(ages) == oldest
    drawn = sum(len(batch.sampled) for batch in batches)
    assert drawn == 24 + sum(b.expired for b in batches) + len(found.waiting)
    assert (sum(batch.expired for batch in batches) > 0) == (bound is not None)


def test_a_pass_that_does_not_fill_a_step_ends_the_data(tmp_path: Path) -> None:
    found = sampler(tmp_path, 12, lambda i: i in (4, 7), gen_batch_size=4)
    with pytest.raises(EndOfData, match=r"12 rows did not fill a step: 2 of the 3 groups"):
        list(steps(found, [0]))
    assert found.sampler.stream.position == 12


def test_the_number_of_passes_is_bounded(tmp_path: Path) -> None:
    found = sampler(tmp_path, 6, lambda i: True, gen_batch_size=3, max_epochs=2)
    assert len(list(steps(found, range(4)))) == 4
    with pytest.raises(EndOfData, match=r"max_epochs=2 passes over the data's 6 rows are made"):
        found.next_batch(4)


def test_what_is_sampled_ahead_is_trained_before_the_data_ends(tmp_path: Path) -> None:
    found = sampler(tmp_path, 6, lambda i: True, gen_batch_size=3, max_epochs=2, mode="ahead")
    assert len(list(steps(found, range(4)))) == 4
    assert found.sampler.stream.position == 12
    with pytest.raises(EndOfData, match=r"max_epochs=2"):
        found.next_batch(4)
