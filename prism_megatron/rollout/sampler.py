"""The prompts of a stream with their responses, batch by batch.

synchronous       step k:  draw, sample with the weights of version k | train | sync k + 1
rollout.ahead     step k:  take the batch that is there | train, while engines sample the next one
                           with the weights of version k | wait for it | sync k + 1
rollout.partial   step k:  the same, but the sync comes at once, what is not complete goes on with
                           the weights of version k + 1, and step k + 1 waits for it

A batch that was sampled ahead trains weights one update newer than those that sampled it, or its
beginning; what it was sampled with comes with it, so that rollout_is can correct for the
difference.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import fields
from itertools import groupby
from typing import Any, Protocol

import numpy as np
import torch

from prism_megatron.config import schema
from prism_megatron.config.schema import Sampling
from prism_megatron.data.stream import BatchStream
from prism_megatron.phases import phase
from prism_megatron.rollout.fleet import Fleet
from prism_megatron.training.watchdog import reached
from prism_megatron.types import Prompt, Rollout


class HasPrompt(Protocol):
    """A task of a stage."""

    @property
    def prompt(self) -> Prompt: ...


class Sampler[T: HasPrompt]:
    """Draws tasks and has them answered; all ranks call it together, and get the same."""

    def __init__(
        self, stream: BatchStream[Any, T], engine: Fleet, sampling: Sampling, config: schema.Rollout
    ) -> None:
        self.stream, self.engine, self.sampling, self.config = stream, engine, sampling, config
        self._asked: list[T] | None = None
        self._ready: list[tuple[T, list[Rollout]]] | None = None

    @property
    def has_drawn(self) -> bool:
        """Whether a batch was drawn that `next` has not given out."""
        return self._asked is not None or self._ready is not None

    def next(self, step: int, *, is_last: bool) -> list[tuple[T, list[Rollout]]]:
        """A batch for the step; is_last: none needs to be sampled while it trains."""
        if not self.has_drawn:
            self._ask(step)
        self._wait(step)
        batch, self._ready = self._ready, None
        assert batch is not None
        if self.config.ahead and not is_last:
            self._ask(step + 1)
        return batch

    @phase("sync")
    def sync(self, version: int) -> dict[str, float]:
        """See Fleet; what is being sampled is waited for, or goes on afterwards."""
        if not self.config.partial:
            self._wait(version)
        reached("a weight sync", self.config.patience)
        return self.engine.sync(version)

    def state_dict(self) -> dict[str, Any]:
        """What is sampled and not given out, as JSON holds it; tasks by the names of their rows.
        After a sync; waits for what is being sampled."""
        self._wait(self.engine.weight_version)
        return {
            "ready": [
                {"row": task.prompt.row_id, "rollouts": [state_of(rollout) for rollout in rollouts]}
                for task, rollouts in self._ready or []
            ]
        }

    def load_state_dict(self, state: dict[str, Any], task_of: Callable[[str], T]) -> None:
        """Undo state_dict. task_of: row name -> its task."""
        ready = state["ready"]
        self._ready = [(task_of(s["row"]), rollouts_of(s["rollouts"])) for s in ready] or None

    def drop(self) -> None:
        """Forget what is sampled and not given out, and wait for what is being sampled."""
        self._wait(self.engine.weight_version)
        self._ready = None

    def _ask(self, step: int) -> None:
        self._asked = self.stream.next_batch()
        self.engine.submit([task.prompt for task in self._asked], self.sampling, step)

    @phase("rollout")
    def _wait(self, version: int) -> None:
        """version: see Fleet.collect."""
        if self._asked is not None:
            reached("rollouts", self.config.patience)
            self._ready = list(zip(self._asked, self.engine.collect(version), strict=True))
            self._asked = None


def stale_share(rollouts: Sequence[Rollout], version: int) -> float:
    """Share of the tokens that other weights than those of `version` sampled."""
    versions = [v for rollout in rollouts for v in rollout.token_versions]
    return sum(v != version for v in versions) / max(1, len(versions))


def cache_shares(samples: Sequence[tuple[Prompt, Rollout]], image_token: int) -> dict[str, float]:
    """What engines had in their prefix caches, of the samples that they tell it of.

    cached_share: of the prompts' tokens. cached_images: of the images, all of whose tokens were
    there, so that they were not encoded again; absent without images.
    """
    tokens = found = images = reused = 0
    for prompt, rollout in samples:
        if rollout.cached is None:
            continue
        tokens, found = tokens + len(prompt.input_ids), found + rollout.cached
        end = 0
        for token, run in groupby(prompt.input_ids):
            end += len(list(run))
            images += token == image_token
            reused += token == image_token and end <= rollout.cached
    shares = {"cached_share": found / tokens} if tokens else {}
    return shares | ({"cached_images": reused / images} if images else {})


def state_of(rollout: Rollout) -> dict[str, Any]:
    """The rollout as JSON holds it."""
    state = {f.name: getattr(rollout, f.name) for f in fields(rollout)}
    if rollout.routes is not None:
        file = io.BytesIO()
        np.save(file, rollout.routes.numpy())
        state["routes"] = base64.b64encode(file.getvalue()).decode()
    return state


def rollouts_of(states: list[dict[str, Any]]) -> list[Rollout]:
    """Undo state_of."""
    found = []
    for state in states:
        values = state | {"ids": tuple(state["ids"]), "logprobs": tuple(state["logprobs"])}
        values["earlier"] = tuple((version, tokens) for version, tokens in state["earlier"])
        if (routes := state["routes"]) is not None:
            values["routes"] = torch.from_numpy(np.load(io.BytesIO(base64.b64decode(routes))))
        found.append(Rollout(**values))
    return found
