"""Carries the policy's weights into the rollout engine."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from prism_megatron.rollout.engine import RolloutEngine


class WeightSync(Protocol):
    """One way of getting weights from the trainer to the engine."""

    def sync(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Load the weights into the engine; returns when it samples with them."""
        ...


@dataclass(frozen=True)
class InProcessSync:
    """The engine lives in the trainer's process."""

    engine: RolloutEngine

    def sync(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Load the weights and make sure that the engine answers with their version.

        RuntimeError if it answers with another: rollouts would be credited to the wrong policy.
        """
        self.engine.load_weights(named_tensors, version)
        if self.engine.weight_version != version:
            raise RuntimeError(
                f"weights of version {version} were sent, but the engine answers with version "
                f"{self.engine.weight_version}; stopping, since its rollouts would be credited "
                "to the wrong weights"
            )
