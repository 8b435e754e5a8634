"""What Ray runs for each engine, and the client that reaches it.

 AsyncLocalEngine   the embedded engine in an actor of its own
 ActorClient        asks it, from a rank or from the fleet's manager

A server process has rollout/server.py's Server for an actor, and is reached by its own protocol.
"""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import ActorDiedError
from torch import Tensor

from prism_megatron.config.schema import Sampling
from prism_megatron.rollout.engine import EngineDied
from prism_megatron.rollout.weight_check import Action
from prism_megatron.types import Prompt, Rollout

if TYPE_CHECKING:
    from prism_megatron.rollout.local import LocalEngine


class AsyncLocalEngine:
    """A LocalEngine as an EngineClient: one prompt after the other, beside the event loop."""

    def __init__(self, hf_dir: Path, seed: int) -> None:
        """See LocalEngine; the weights come by load_weights."""
        self.hf_dir, self.seed = hf_dir, seed
        self._turn = asyncio.Lock()
        self._stops: set[Event] = set()
        self._engine: LocalEngine | None = None

    async def start(self, timeout: float) -> None:
        """Load the model; TimeoutError if that takes longer than `timeout` seconds."""
        # the manager imports this class too, and has no use for transformers
        from prism_megatron.rollout.local import LocalEngine

        async with asyncio.timeout(timeout):
            self._engine = await asyncio.to_thread(
                LocalEngine, self.hf_dir, seed=self.seed, pretrained=False
            )

    async def generate(self, prompt: Prompt, sampling: Sampling, key: str) -> list[Rollout]:
        """See EngineClient."""
        stop = Event()
        self._stops.add(stop)
        try:
            async with self._turn:
                [rollouts] = await asyncio.to_thread(
                    self.engine.sample, [prompt], sampling, [key], stop
                )
            return rollouts
        finally:
            # a thread can't be cancelled: if this task was, it ends after the token at hand
            stop.set()
            self._stops.discard(stop)

    async def load_weights(self, tensors: list[tuple[str, Tensor]], version: int) -> None:
        """See RolloutEngine; waits for the prompt at hand."""
        async with self._turn:
            await asyncio.to_thread(self.engine.load_weights, tensors, version)

    async def alive(self) -> None:
        """See Server: who answers is."""

    async def health(self) -> None:
        """See EngineClient."""

    async def weight_version(self) -> int:
        """See EngineClient."""
        return self.engine.weight_version

    async def check(self, action: Action) -> None:
        """See EngineClient."""
        async with self._turn:
            await asyncio.to_thread(self.engine.weight_check.run, action)

    async def abort(self) -> None:
        """See EngineClient."""
        for stop in self._stops:
            stop.set()

    async def close(self) -> None:
        """See EngineClient."""

    async def stop(self) -> None:
        """Nothing outlives the process."""
        await self.abort()

    @property
    def engine(self) -> LocalEngine:
        assert self._engine is not None, "start comes first"
        return self._engine


class ActorClient:
    """An EngineClient that passes everything on to an actor with an AsyncLocalEngine."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    async def generate(self, prompt: Prompt, sampling: Sampling, key: str) -> list[Rollout]:
        """See EngineClient."""
        answer = self._actor.generate.remote(prompt, sampling, key)
        try:
            with _as_engine_died():
                rollouts: list[Rollout] = await answer
            return rollouts
        except asyncio.CancelledError:
            ray.cancel(answer)
            raise

    async def health(self) -> None:
        """See EngineClient."""
        with _as_engine_died():
            await self._actor.health.remote()

    async def weight_version(self) -> int:
        """See EngineClient."""
        with _as_engine_died():
            return int(await self._actor.weight_version.remote())

    async def check(self, action: Action) -> None:
        """See EngineClient."""
        with _as_engine_died():
            await self._actor.check.remote(action)

    async def abort(self) -> None:
        """See EngineClient."""
        with _as_engine_died():
            await self._actor.abort.remote()

    async def close(self) -> None:
        """See EngineClient."""


def in_words(error: BaseException) -> str:
    """An error in words; of one that was raised in another process, without that one's stack. One
    that is a defect, ours or a server's answer that is not as expected, says where."""
    cause = getattr(error, "cause", None) or error
    words = f"{type(cause).__name__}: {cause}"
    if isinstance(cause, LookupError | AttributeError | TypeError | AssertionError):
        words += "".join(
            f" ({Path(frame.filename).name}:{frame.lineno})"
            for frame in traceback.extract_tb(cause.__traceback__)[-1:]
        )
    return words


@contextmanager
def _as_engine_died() -> Iterator[None]:
    try:
        yield
    except ActorDiedError as error:
        raise EngineDied(str(error)) from error
