"""The groups of responses that a step trains on, without those that teach nothing.

    prompts --sample and reward--> groups --some right, some wrong?--> waiting --> the step's groups
       ^_______________________ while too few wait ___________________|   surplus: the next step's

A group in which all answers are right or all are wrong has no advantages (DAPO, section 3.2).
Surplus groups are sampled from weights one update older than those they train; the engine's
log-probabilities go with them, so that rollout_is can correct for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from prism_megatron.data.stream import BatchStream
from prism_megatron.objectives.rewards.types import Reward
from prism_megatron.training.loop import EndOfData
from prism_megatron.types import Prompt, Rollout


class HasPrompt(Protocol):
    """A task of a stage."""

    @property
    def prompt(self) -> Prompt: ...


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


class DynamicSampler[T: HasPrompt]:
    """Gives each step its groups; every rank draws and keeps the same ones."""

    def __init__(
        self,
        stream: BatchStream[Any, T],
        sample: Callable[[list[T], int], list[Group[T]]],
        *,
        batch_size: int,
        filtered: bool,
        num_rows: int,
        max_epochs: int | None,
    ) -> None:
        """stream: the prompts, in batches as they are sampled; sample: (tasks, step) -> groups;
        batch_size: groups a step; filtered: leave out those that do not differ; num_rows: length of
        the data, of which max_epochs passes are made."""
        self.stream, self.sample = stream, sample
        self.batch_size, self.filtered = batch_size, filtered
        self.num_rows, self.max_epochs = num_rows, max_epochs
        self.waiting: list[Group[T]] = []

    def next_batch(self, step: int) -> tuple[list[Group[T]], list[Group[T]]]:
        """The step's groups, and all that were sampled for it.

        EndOfData if the data was passed max_epochs times, or once in this step without filling it.
        """
        start = self.stream.position
        sampled: list[Group[T]] = []
        while len(self.waiting) < self.batch_size:
            self._check_data_is_left(start)
            groups = self.sample(self.stream.next_batch(), step)
            sampled += groups
            self.waiting += [g for g in groups if g.differs or not self.filtered]
        batch, self.waiting = self.waiting[: self.batch_size], self.waiting[self.batch_size :]
        return batch, sampled

    def _check_data_is_left(self, start: int) -> None:
        drawn = self.stream.position
        found = f"{len(self.waiting)} of the {self.batch_size} groups of a step were found"
        if self.max_epochs is not None and drawn >= self.max_epochs * self.num_rows:
            raise EndOfData(
                f"max_epochs={self.max_epochs} passes over the data's {self.num_rows} rows are "
                f"made; {found}"
            )
        if drawn - start >= self.num_rows:
            raise EndOfData(
                f"a whole pass over the data's {self.num_rows} rows did not fill a step: {found}, "
                "the other prompts are answered always or never; take data of another difficulty, "
                "or dynamic_sampling=false"
            )

    def state_dict(self) -> dict[str, Any]:
        """The waiting groups, as JSON holds them; tasks by the names of their rows."""
        return {
            "waiting": [
                {
                    "row": group.task.prompt.row_id,
                    "rollouts": [asdict(rollout) for rollout in group.rollouts],
                    "rewards": [asdict(reward) for reward in group.rewards],
                }
                for group in self.waiting
            ]
        }

    def load_state_dict(self, state: dict[str, Any], task_of: Callable[[str], T]) -> None:
        """Undo state_dict. task_of: row name -> its task."""
        self.waiting = [
            Group(
                task_of(saved["row"]),
                [_rollout(values) for values in saved["rollouts"]],
                [Reward(**values) for values in saved["rewards"]],
            )
            for saved in state["waiting"]
        ]


def _rollout(values: dict[str, Any]) -> Rollout:
    ids, logprobs = tuple(values["ids"]), tuple(values["logprobs"])
    return Rollout(**(values | {"ids": ids, "logprobs": logprobs}))
