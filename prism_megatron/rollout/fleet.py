"""Embedded engines, one a rank, that sample a batch of prompts together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from prism_megatron.config.schema import Sampling
from prism_megatron.rollout.engine import RolloutEngine
from prism_megatron.types import Prompt, Rollout


class EmbeddedFleet:
    """A RolloutEngine over all ranks: each samples every world-th prompt, all get all rollouts."""

    def __init__(self, engine: RolloutEngine) -> None:
        self.engine = engine

    @property
    def weight_version(self) -> int:
        return self.engine.weight_version

    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        self.engine.load_weights(named_tensors, version)

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, step: int
    ) -> list[list[Rollout]]:
        world, rank = dist.get_world_size(), dist.get_rank()
        mine = self.engine.generate(prompts[rank::world], sampling, step)
        gathered: list[Any] = [None] * world
        dist.all_gather_object(gathered, mine)
        merged: list[list[Rollout]] = [[]] * len(prompts)
        for first, part in enumerate(gathered):
            merged[first::world] = part
        return merged
