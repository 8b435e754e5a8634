"""Which engine gets the next prompt: states and outstanding tokens of all engines in one place.

 ranks:     acquire(tokens) --> lease on the healthy engine with the fewest outstanding tokens
                                (waits while all are full or suspect; None if none can serve)
            release(lease, outcome)
 watchers:  restart, is_up, checked, died

It sees token counts, never prompts or answers. One event loop runs it; nothing here knows Ray.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from prism_megatron.rollout.engine_state import SERVING, UP, EngineHealth, EngineState


@dataclass(frozen=True)
class Lease:
    """Leave to send one prompt to one engine.

    incarnation: counts the starts of the engine; what happens to a lease on an earlier process
    says nothing about the present one. address: how to reach it.
    """

    engine: int
    incarnation: int
    tokens: int
    address: Any


@dataclass(frozen=True)
class Outcome:
    """How a lease ended.

    version: of the weights that answered; None if there was no answer. died: its process is gone.
    fault: what the engine did wrong; without it, and without a version, the asker gave up.
    """

    version: int | None = None
    fault: str = ""
    died: bool = False


@dataclass
class Engine:
    """What the router knows of an engine; `outstanding` tokens are promised to it and unanswered.

    restarts: starts since the last answered request, the first start not counted; fault: why it
    failed last; given_up: it will not be started again.
    """

    health: EngineHealth
    incarnation: int = 0
    restarts: int = 0
    outstanding: int = 0
    address: Any = None
    fault: str = ""
    given_up: bool = False

    @property
    def state(self) -> EngineState:
        return self.health.state


@dataclass
class _Waiting:
    tokens: int
    lease: asyncio.Future[Lease | None] = field(default_factory=asyncio.Future)


class Router:
    """Engines by number, their states, and who waits for them, first come first served."""

    def __init__(self, engines: int, *, max_failures: int, max_outstanding_tokens: int) -> None:
        """max_outstanding_tokens: bound of one engine; a larger prompt goes to an idle one."""
        self.engines = [Engine(EngineHealth(max_failures)) for _ in range(engines)]
        self.max_outstanding_tokens = max_outstanding_tokens
        self.expected = -1
        self._queue: deque[_Waiting] = deque()
        self._changed = asyncio.Event()

    async def acquire(self, tokens: int) -> Lease | None:
        """A lease for a prompt that costs `tokens`, or None if only new weights can help."""
        waiting = _Waiting(tokens)
        self._queue.append(waiting)
        self._dispatch()
        try:
            return await waiting.lease
        except asyncio.CancelledError:
            # it may have come together with the cancellation
            if waiting.lease.done() and not waiting.lease.cancelled():
                if lease := waiting.lease.result():
                    self.release(lease, Outcome())
            raise

    def release(self, lease: Lease, outcome: Outcome) -> None:
        """Give a lease back. What happened to an earlier process of the engine is history."""
        engine = self.engines[lease.engine]
        if engine.incarnation != lease.incarnation or engine.state is EngineState.DEAD:
            return
        engine.outstanding -= lease.tokens
        assert engine.outstanding >= 0, f"engine {lease.engine}: {engine.outstanding} tokens left"
        if outcome.died:
            self.died(lease.engine, outcome.fault)
        elif outcome.fault:
            self._failed(lease.engine, "request", outcome.fault)
        elif outcome.version is not None:
            engine.health.answered("request", outcome.version, self.expected)
            engine.restarts = 0
        self.notify()

    def restart(self, number: int) -> None:
        """A new process of the engine is being started."""
        engine = self.engines[number]
        engine.health.restart()
        engine.restarts += engine.incarnation > 0
        engine.incarnation += 1
        engine.outstanding, engine.address = 0, None
        self.notify()

    def is_up(self, number: int, address: Any) -> None:
        """The new process answers at `address`; it gets requests once it has the weights."""
        self.engines[number].health.is_up()
        self.engines[number].address = address
        self.notify()

    def checked(self, number: int, version: int | None, fault: str = "") -> None:
        """A health check ended: with the engine's weight version, or None and what was wrong."""
        if version is None:
            self._failed(number, "check", fault)
        else:
            self.engines[number].health.answered("check", version, self.expected)
        self.notify()

    def died(self, number: int, fault: str) -> None:
        """The engine's process has ended."""
        engine = self.engines[number]
        engine.health.died()
        engine.fault, engine.outstanding = fault, 0
        self.notify()

    def give_up(self, number: int) -> None:
        """The dead engine will not be started again."""
        engine = self.engines[number]
        assert engine.state is EngineState.DEAD, f"an engine given up while it is {engine.state}"
        engine.given_up = True
        self.notify()

    def expect(self, version: int) -> list[Lease]:
        """From now on only weights of `version` count; the engines that can be given them.

        To be called while no prompt is out: an answer would mix two versions.
        """
        out = {i: engine.outstanding for i, engine in enumerate(self.engines) if engine.outstanding}
        assert not out, f"new weights while engines have outstanding tokens: {out}"
        self.expected = version
        leases = self.up()
        for lease in leases:
            self.engines[lease.engine].health.expect_other_weights()
        self.notify()
        return leases

    def up(self) -> list[Lease]:
        """Leases, without tokens, on the engines that answer."""
        return [
            Lease(number, engine.incarnation, 0, engine.address)
            for number, engine in enumerate(self.engines)
            if engine.state in UP
        ]

    async def until(self, reached: Callable[[], bool]) -> None:
        """Return once `reached()` holds; asked after every event."""
        while not reached():
            await self._changed.wait()

    def _failed(self, number: int, probe: Any, fault: str) -> None:
        engine = self.engines[number]
        engine.health.failed(probe)
        engine.fault = fault
        if engine.state is EngineState.DEAD:
            engine.outstanding = 0

    def notify(self) -> None:
        """Something that `until` waits for may have happened."""
        self._changed.set()
        self._changed = asyncio.Event()
        self._dispatch()

    def _dispatch(self) -> None:
        while self._queue:
            waiting = self._queue[0]
            if not waiting.lease.done():
                number = self._choose(waiting.tokens)
                if number is not None:
                    engine = self.engines[number]
                    engine.outstanding += waiting.tokens
                    waiting.lease.set_result(
                        Lease(number, engine.incarnation, waiting.tokens, engine.address)
                    )
                elif not any(engine.state in SERVING for engine in self.engines):
                    waiting.lease.set_result(None)
                else:
                    return
            self._queue.popleft()

    def _choose(self, tokens: int) -> int | None:
        able = [
            (engine.outstanding, number)
            for number, engine in enumerate(self.engines)
            if engine.state is EngineState.HEALTHY
            and (
                not engine.outstanding or engine.outstanding + tokens <= self.max_outstanding_tokens
            )
        ]
        return min(able)[1] if able else None
