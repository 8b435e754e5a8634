"""All engines of a run together, as a pipeline has them: prompts in, rollouts and versions out.

EmbeddedFleet   an engine in every rank, each sampling its share of the prompts
RayFleet        engines that Ray places and watches (rollout/ray_fleet.py)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from checkpoint_tools.hf_directory import HFDirectory
from model_providers.qwen3_vl import Qwen3VLModel
from model_providers.weight_map import unused_names
from model_providers.weight_plan import iter_hf_weights
from prism_megatron.config import schema
from prism_megatron.config.schema import Sampling
from prism_megatron.rollout.local import LocalEngine
from prism_megatron.rollout.weight_check import Action
from prism_megatron.rollout.weight_sync import InProcessSync
from prism_megatron.types import Prompt, Rollout

Weights = Callable[[], Iterable[tuple[str, Tensor]]]
"""The policy's weights of now, full tensors under their Hugging Face names; all ranks call it."""
Answered = Callable[[int, list[Rollout]], None]
"""Gets a prompt's place among those submitted, and its rollouts."""


class Fleet(Protocol):
    """What all ranks call together."""

    @property
    def weight_version(self) -> int:
        """Version of the weights that the next response is sampled with; -1 before any sync."""
        ...

    @property
    def restarts(self) -> int:
        """How often engines had been started again by the last sync, over all of them."""
        ...

    def sync(self, version: int) -> dict[str, float]:
        """Give the engines the policy's weights of now, and make sure that they have them; seconds
        by phase, "total" among them."""
        ...

    def sleep(self) -> dict[str, float]:
        """With rollout.sleep, have the engines give their memory to the trainers until the next
        sync, and say how much there is; nothing otherwise."""
        ...

    def readmit(self) -> None:
        """Give engines that were started again since the last sync the same weights, which must
        still be the policy's, so that they serve, too; nothing if there are none, or prompts are
        out."""
        ...

    def check(self, action: Action) -> list[str]:
        """Do this part of a WeightCheck in every engine; what they say is wrong, on all ranks."""
        ...

    def submit(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        step: int,
        answered: Answered | None = None,
    ) -> None:
        """Have prompts answered, of which every rank gives the same; see RolloutEngine.generate.
        Returns at once where the engines are processes of their own.

        answered: gets the answers to this rank's share as they come, on any thread."""
        ...

    def collect(self, version: int) -> list[list[Rollout]]:
        """Wait for the answers to the prompts submitted last; every rank gets all of them.

        version: of the policy's weights of now, which may be newer than those that sample; engines
        that lost theirs meanwhile get these.
        """
        ...


def build(
    config: schema.Rollout,
    policy: Qwen3VLModel | None,
    hf_dir: Path,
    *,
    seed: int,
    logs: Path,
    device: torch.device | str = "cpu",
    release: Callable[[], None] = lambda: None,
    routes: bool = False,
) -> Fleet:
    """The configured fleet for a policy; only the embedded one has weights yet, and only hf_dir's.

    policy: None where nobody trains it, so that syncs bring the weights in hf_dir. hf_dir: Hugging
    Face directory with the policy's config and processor; logs: folder for what servers write;
    device: of the embedded engine; release: has the trainer give back the memory that only updates
    need, before engines that slept take theirs; routes: rollouts come with the experts that tokens
    took.
    """
    weights: Weights
    if policy is None:
        weights = partial(stored_weights, hf_dir)
    else:
        weights = partial(iter_hf_weights, policy)
    if config.kind == "embedded":
        engine = LocalEngine(hf_dir, seed=seed, device=device, pretrained=policy is None)
        return EmbeddedFleet(engine, weights)
    if find_spec("ray") is None:
        raise ValueError(
            f"rollout.kind={config.kind} needs Ray; pip install 'prism-megatron[ray]', or set "
            "rollout.kind=embedded"
        )
    from prism_megatron.rollout.quantized import served_directory
    from prism_megatron.rollout.ray_fleet import RayFleet, send_through_ray
    from prism_megatron.rollout.refit import ServerRefit, server_kind

    if config.kind == "local":
        return RayFleet(config, send_through_ray(weights), model=hf_dir, seed=seed, logs=logs)
    if config.quantization is not None:
        assert policy is not None, "a directory is served as it is"
        hf_dir = served_directory(config, policy, hf_dir, (logs / "served").resolve())
    refit = ServerRefit(config, policy, hf_dir)
    server = server_kind(config, hf_dir, routes)
    return RayFleet(
        config, refit, model=hf_dir, seed=seed, logs=logs, server=server, release=release
    )


def stored_weights(hf_dir: Path) -> Iterator[tuple[str, Tensor]]:
    """The weights of a Hugging Face directory that a language model of its config has."""
    stored = HFDirectory(hf_dir)
    unused = unused_names(stored.config, "language")
    return ((name, stored[name]) for name in stored if name not in unused)


def share_out[T, R](items: Sequence[T], compute: Callable[[Sequence[T]], Sequence[R]]) -> list[R]:
    """compute(items), of which each rank computes every world-th; all get all results, in order."""
    return merge_shares(compute(own_share(items)), len(items))


class EmbeddedFleet:
    """A LocalEngine in every rank: each samples every world-th prompt, all get all rollouts."""

    restarts = 0

    def __init__(self, engine: LocalEngine, weights: Weights) -> None:
        self.engine, self.weights = engine, weights
        self._submitted: tuple[Sequence[Prompt], Sampling, int, Answered | None] | None = None

    @property
    def weight_version(self) -> int:
        return self.engine.weight_version

    def sync(self, version: int) -> dict[str, float]:
        return InProcessSync(self.engine).sync(self.weights(), version)

    def sleep(self) -> dict[str, float]:
        return {}

    def readmit(self) -> None:
        pass

    def check(self, action: Action) -> list[str]:
        wrong: list[str] = [""] * dist.get_world_size()
        try:
            self.engine.weight_check.run(action)
            found = ""
        except RuntimeError as error:
            found = f"rank {dist.get_rank()}: {error}"
        dist.all_gather_object(wrong, found)
        return [words for words in wrong if words]

    def submit(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        step: int,
        answered: Answered | None = None,
    ) -> None:
        self._submitted = prompts, sampling, step, answered

    def collect(self, version: int) -> list[list[Rollout]]:
        assert self._submitted is not None, "nothing was submitted"
        (prompts, sampling, step, answered), self._submitted = self._submitted, None
        mine = self.engine.generate(own_share(prompts), sampling, step)
        if answered is not None:
            for number, rollouts in enumerate(mine):
                answered(own_place(number), rollouts)
        return merge_shares(mine, len(prompts))


def own_share[T](items: Sequence[T]) -> Sequence[T]:
    """Every world-th item, from this rank's number on."""
    return items[dist.get_rank() :: dist.get_world_size()]


def own_place(number: int) -> int:
    """Where the item of that number in own_share is among all items."""
    return dist.get_rank() + number * dist.get_world_size()


def merge_shares[R](
    mine: Sequence[R], count: int, group: dist.ProcessGroup | None = None
) -> list[R]:
    """What became of all `count` items, on every rank, from that of each rank's own share."""
    world = dist.get_world_size()
    gathered: list[Any] = [None] * world
    dist.all_gather_object(gathered, mine, group=group)
    merged: list[Any] = [None] * count
    for first, part in enumerate(gathered):
        merged[first::world] = part
    return merged
