"""The seams between training and whatever samples the responses.

RolloutEngine   what a pipeline samples with, in its own process
EngineClient    how a fleet drives one engine that lives elsewhere: a server, or an actor
ServerClient    the same with what only a server on GPUs can do
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal, Protocol

from torch import Tensor

from prism_megatron.config.schema import Sampling
from prism_megatron.rollout.weight_check import Action
from prism_megatron.types import Prompt, Rollout

Part = Literal["weights", "kv_cache"]
LOAD_SECONDS = 1800
"""Longest wait for weights that are loaded, compared or read from a disk."""


class EngineDied(RuntimeError):
    """The engine's process is gone; only a new one can answer again."""


class RolloutEngine(Protocol):
    """Samples responses from a copy of the policy, and says which weights it sampled with.

    The engine sees the prompt's ids and pixels as they are, without tokenising or resizing again,
    so the trainer trains on exactly the ids that were sampled.
    """

    @property
    def weight_version(self) -> int:
        """Version of the weights that the next response is sampled with; -1 before any load."""
        ...

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, step: int
    ) -> list[list[Rollout]]:
        """sampling.n rollouts for each prompt, in the order of the prompts.

        The random numbers of a rollout follow from the engine's seed, step, the prompt's row_id
        and the rollout's number, not from the other prompts of the call: a prompt gets the same
        responses on whichever rank, and beside whichever others, it is sampled.
        """
        ...

    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Replace all weights by full tensors under their Hugging Face names.

        ValueError if a name is missing, surplus or repeated, or a shape differs; the engine then
        keeps its old weights and version.
        """
        ...


class EngineClient(Protocol):
    """One engine, asked by any number of tasks of one event loop at the same time.

    Every method raises EngineDied if it knows that the engine's process is gone, and any other
    error but ValueError if the engine did not answer as it should.
    """

    async def generate(self, prompt: Prompt, sampling: Sampling, key: str) -> list[Rollout]:
        """sampling.n rollouts of one prompt; finish_reason "abort" on those that abort() cut off.

        key: makes the random numbers, together with the engine's seed and the rollout's number,
        where the engine lets its asker choose them.
        ValueError, with its row_id, if the prompt can't be sampled from, by whichever engine.
        """
        ...

    async def health(self) -> None:
        """Returns if the engine answers, also while it generates."""
        ...

    async def weight_version(self) -> int:
        """Version of the weights that the next response is sampled with; -1 before any load."""
        ...

    async def check(self, action: Action) -> None:
        """Part of a check that weights come; see weight_check.WeightCheck.run."""
        ...

    async def abort(self) -> None:
        """Requests that the engine has taken return what they have sampled so far."""
        ...

    async def close(self) -> None:
        """Let go of connections; the engine itself goes on."""
        ...


class ServerClient(EngineClient, Protocol):
    """An engine that can give its GPUs' memory to the trainers for a while.

    Asleep it answers questions for health and version, and samples nothing. What else computes on
    its GPUs must have ended: SGLang unmaps weights without waiting for copies of its buffers
    (scheduler_update_weights_mixin.py, release_memory_occupation).
    """

    async def sleep(self) -> None:
        """Give back the memory of weights and KV cache, and forget what was in it."""
        ...

    async def wake(self, part: Part) -> None:
        """Take the memory of a part again; the weights come by a sync in between."""
        ...


def request_keys(prompts: Sequence[Prompt], step: int) -> list[str]:
    """What makes each prompt's random numbers in a step; a prompt that comes twice gets two."""
    seen: Counter[str] = Counter()
    keys = []
    for prompt in prompts:
        keys.append(f"{step}/{prompt.row_id}/{seen[prompt.row_id]}")
        seen[prompt.row_id] += 1
    return keys
