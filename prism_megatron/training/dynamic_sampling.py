"""The groups of responses that a step trains on, without those that teach nothing.

    prompts --sample and reward--> groups --some right, some wrong?--> waiting --> the step's groups
       ^_______________________ while too few wait ___________________|   surplus: the next step's

A group in which all answers are right or all are wrong has no advantages (DAPO, section 3.2).
Surplus groups are sampled from older weights than those they train; the engine's log-probabilities
go with them, so that rollout_is can correct for it, and max_staleness bounds how old they get.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from prism_megatron.objectives.rewards.types import Reward
from prism_megatron.rollout.sampler import HasPrompt, Sampler, rollouts_of, state_of
from prism_megatron.training.loop import EndOfData
from prism_megatron.types import Rollout


@dataclass(frozen=True)
class Group[T: HasPrompt]:
    """A task with its responses and their rewards."""

    task: T
    rollouts: list[Rollout]
    rewards: list[Reward]

    @property
    def differs(self) -> bool:
        """Whether some answers are right and some are wrong."""
        return len({reward.accuracy for reward in self.rewards}) > 1


@dataclass(frozen=True)
class Batch[T: HasPrompt]:
    """What a step gets: the groups it trains on, all that were sampled for it, and how many were
    left out because they had become too old."""

    groups: list[Group[T]]
    sampled: list[Group[T]]
    expired: int


class DynamicSampler[T: HasPrompt]:
    """Gives each step its groups; every rank draws and keeps the same ones."""

    def __init__(
        self,
        sampler: Sampler[T],
        reward: Callable[[list[tuple[T, list[Rollout]]]], list[Group[T]]],
        *,
        batch_size: int,
        filtered: bool,
        num_rows: int,
        max_epochs: int | None,
        max_staleness: int | None,
        steps: int,
    ) -> None:
        """batch_size: groups a step; filtered: leave out those that do not differ; num_rows: length
        of the data, of which max_epochs passes are made; max_staleness: updates between the weights
        that sampled a group and those that it trains, any number if None; steps: of the run."""
        self.sampler, self.reward = sampler, reward
        self.batch_size, self.filtered = batch_size, filtered
        self.num_rows, self.max_epochs = num_rows, max_epochs
        self.max_staleness, self.steps = max_staleness, steps
        self.waiting: list[Group[T]] = []

    def next_batch(self, step: int) -> Batch[T]:
        """The step's groups.

        EndOfData if the data was passed max_epochs times, or once in this step without filling it.
        """
        start = self.sampler.stream.position
        fresh = [group for group in self.waiting if not self._is_expired(group, step)]
        expired, self.waiting = len(self.waiting) - len(fresh), fresh
        sampled: list[Group[T]] = []
        while len(self.waiting) < self.batch_size:
            if not self.sampler.has_drawn:
                self._check_data_is_left(start)
            is_last = step + 1 == self.steps or bool(self._end())
            groups = self.reward(self.sampler.next(step, is_last=is_last))
            sampled += groups
            self.waiting += [g for g in groups if g.differs or not self.filtered]
        groups, self.waiting = self.waiting[: self.batch_size], self.waiting[self.batch_size :]
        return Batch(groups, sampled, expired)

    def _is_expired(self, group: Group[T], step: int) -> bool:
        oldest = min(v for rollout in group.rollouts for v in rollout.token_versions)
        return self.max_staleness is not None and step - oldest > self.max_staleness

    def _end(self) -> str:
        """Why no batch may be drawn any more, or nothing."""
        if self.max_epochs is None or (
            self.sampler.stream.position < self.max_epochs * self.num_rows
        ):
            return ""
        return f"max_epochs={self.max_epochs} passes over the data's {self.num_rows} rows are made"

    def _check_data_is_left(self, start: int) -> None:
        found = f"{len(self.waiting)} of the {self.batch_size} groups of a step were found"
        if end := self._end():
            raise EndOfData(f"{end}; {found}")
        if self.sampler.stream.position - start >= self.num_rows:
            raise EndOfData(
                f"a whole pass over the data's {self.num_rows} rows did not fill a step: {found}, "
                "the other prompts are answered always or never; take data of another difficulty, "
                "or dynamic_sampling=false"
            )

    def drop(self) -> None:
        """Forget all groups that were not trained on."""
        self.sampler.drop()
        self.waiting = []

    def state_dict(self) -> dict[str, Any]:
        """What is sampled and not trained on, as JSON holds it; tasks by their rows' names."""
        return self.sampler.state_dict() | {
            "waiting": [
                {
                    "row": group.task.prompt.row_id,
                    "rollouts": [state_of(rollout) for rollout in group.rollouts],
                    "rewards": [asdict(reward) for reward in group.rewards],
                }
                for group in self.waiting
            ]
        }

    def load_state_dict(self, state: dict[str, Any], task_of: Callable[[str], T]) -> None:
        """Undo state_dict. task_of: row name -> its task."""
        self.sampler.load_state_dict(state, task_of)
        self.waiting = [
            Group(
                task_of(saved["row"]),
                rollouts_of(saved["rollouts"]),
                [Reward(**values) for values in saved["rewards"]],
            )
            for saved in state["waiting"]
        ]
