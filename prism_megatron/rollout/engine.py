"""The seam between training and whatever samples the responses."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from torch import Tensor

from prism_megatron.config.schema import Sampling
from prism_megatron.types import Prompt, Rollout


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
