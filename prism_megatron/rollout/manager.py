"""The manager of a fleet: one small Ray actor that places, watches and restarts the engines, and
tells every rank which of them to ask next.

  ranks --acquire, release (token counts)--> Manager --start, health--> engine actors, one each
    |                                        (Router)                   |  Server: a process on GPUs
    +------- prompts, pixels, rollouts ---------------------------------+  AsyncLocalEngine: itself

Prompts and answers don't pass through here. The manager belongs to the process that made it, and
the engine actors belong to the manager: when the first rank ends, however it ends, Ray ends them
all, and each Server's guard ends its process.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import traceback
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ActorDiedError
from ray.util import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from prism_megatron.config.schema import Rollout as RolloutConfig
from prism_megatron.rollout.actors import AsyncLocalEngine, in_words
from prism_megatron.rollout.engine import LOAD_SECONDS, EngineDied, Part
from prism_megatron.rollout.engine_state import UP, EngineState, Probe
from prism_megatron.rollout.router import Engine, Lease, Outcome, Router
from prism_megatron.rollout.server import Server, ServerKind

STOP_SECONDS = 20
"""How long an engine may take to end by itself before its actor is killed."""
PROCESS_SECONDS = 300
"""How long Ray may take to find an actor a node and to start its process there."""


class Manager:
    """See the top of this file; an async actor."""

    def __init__(
        self,
        config: RolloutConfig,
        *,
        model: Path,
        seed: int,
        logs: Path,
        server: ServerKind | None,
    ) -> None:
        """model, seed: of LocalEngine actors; server: what to start instead of them; logs: folder
        for the servers' output."""
        self.config, self.model, self.seed = config, model, seed
        self.logs, self.server = logs, server
        self.router = Router(
            config.engines,
            max_failures=config.max_failures,
            max_outstanding_tokens=config.max_outstanding_tokens,
        )
        self._events: list[str] = []
        self._leases: list[Lease] = []
        # incarnations of engines that are busy with weights, and until when that is believed
        self._loading: dict[int, int] = {}
        self._loading_until = 0.0
        self._supervisors: list[asyncio.Task[None]] = []
        self._actors: dict[int, Any] = {}
        self._group: Any = None
        self._asleep = False
        # engines whose process may hold memory of its GPUs
        self._awake: set[int] = set()

    async def start(self) -> None:
        """Place and start all engines; RuntimeError if one of them does not come up."""
        await self._place()
        count = self.config.engines
        self._supervisors = [asyncio.create_task(self._supervise(i)) for i in range(count)]
        engines = self.router.engines
        await self.router.until(
            lambda: all(engine.state in UP or engine.given_up for engine in engines)
        )
        if failed := [i for i in range(count) if engines[i].given_up]:
            raise RuntimeError(
                f"{len(failed)} of {count} rollout engines did not start; engine {failed[0]}: "
                f"{engines[failed[0]].fault}"
            )

    async def acquire(self, tokens: int) -> Lease | None:
        """See Router."""
        return await self.router.acquire(tokens)

    async def release(self, lease: Lease, outcome: Outcome) -> None:
        """See Router."""
        self.router.release(lease, outcome)

    async def expect(self, version: int) -> None:
        """From now on only weights of `version` count; `refitting` says who can be given them."""
        self._leases = self.router.expect(version)
        self._load(self._leases)

    async def refitting(self) -> list[Lease]:
        """The engines that can be given the weights of the last `expect`."""
        return self._leases

    async def up(self) -> list[Lease]:
        """See Router."""
        return self.router.up()

    async def begin_check(self) -> list[Lease]:
        """The engines that are up, whose weights are checked until `end_check`."""
        leases = self.router.up()
        self._load(leases)
        return leases

    async def end_check(self) -> None:
        """See begin_check."""
        self._loading = {}

    def _load(self, leases: list[Lease]) -> None:
        """These engines answer no question for their health until they are done with weights:
        SGLang's scheduler loads and compares them between two requests."""
        self._loading = {lease.engine: lease.incarnation for lease in leases}
        self._loading_until = time.monotonic() + LOAD_SECONDS

    def _is_loading(self, lease: Lease) -> bool:
        is_overdue = time.monotonic() > self._loading_until
        return not is_overdue and self._loading.get(lease.engine) == lease.incarnation

    async def is_any_stale(self) -> bool:
        """Whether an engine answers, but not with the weights of now."""
        return any(engine.state is EngineState.STALE for engine in self.router.engines)

    async def confirm(self, broken: Mapping[int, str]) -> None:
        """Ask the refitted engines for their version; those that have the expected one serve.

        broken: see SyncFailed; those engines are started again, whatever version they answer with.

        One that answers with an older version is left to the next sync, one that does not answer to
        its supervisor. One with a newer version, from before the run went back to a checkpoint, is
        started again: its number will come once more, for other weights.
        """
        self._loading = {}
        for lease in self._leases:
            if lease.engine in broken and self._is_up(lease):
                self.router.died(
                    lease.engine,
                    f"weights of version {self.router.expected} did not get to it: "
                    f"{broken[lease.engine]}",
                )
        # without asking for their health, which takes SGLang a second
        versions = await asyncio.gather(
            *(self._check(lease, ask_health=False) for lease in self._leases)
        )
        for lease, version in zip(self._leases, versions, strict=True):
            if version is not None and version > self.router.expected:
                self.router.died(
                    lease.engine,
                    f"it kept weights of version {version}, which are none of this run any more, "
                    f"when those of version {self.router.expected} were sent",
                )
            elif version not in (None, self.router.expected):
                self._event(
                    lease.engine,
                    f"answers with version {version} after weights of version "
                    f"{self.router.expected} were sent; it serves after a sync that reaches it",
                )

    async def restarts(self) -> int:
        """How often engines have been started again so far."""
        return sum(max(0, engine.incarnation - 1) for engine in self.router.engines)

    async def sleep(self) -> None:
        """Have all engines give their GPUs' memory back; returns when they have. None is started
        again until `wake`.

        One that is being started sleeps once it has, and a dead one's process ends first: the
        policy can't train beside either.
        """

        async def put_to_sleep(number: int) -> None:
            await self._actors[number].sleep.remote()
            self._awake.discard(number)

        self._asleep = True
        await self._all(put_to_sleep)
        await self.router.until(lambda: not self._awake)

    async def wake(self, part: Part) -> None:
        """Have the engines that sleep take the memory of a part again, the KV cache's last."""

        async def wake_up(number: int) -> None:
            self._awake.add(number)
            await self._actors[number].wake.remote(part)

        if self._asleep:
            await self._all(wake_up)
            self._asleep = part != "kv_cache"
            self.router.notify()

    async def _all(self, call: Callable[[int], Awaitable[None]]) -> None:
        """Call every engine that is up; one that fails is dead, since what memory it has is not
        known."""

        async def one(lease: Lease) -> None:
            try:
                async with asyncio.timeout(self.config.request_timeout):
                    await call(lease.engine)
            except Exception as error:
                if self._is_up(lease):
                    self.router.died(lease.engine, in_words(error))

        await asyncio.gather(*map(one, self.router.up()))

    async def wait_for_engine(self) -> None:
        """Return once an engine is up; RuntimeError if none will come up any more."""
        engines = self.router.engines
        await self.router.until(
            lambda: (
                any(engine.state in UP for engine in engines)
                or all(engine.given_up for engine in engines)
            )
        )
        if all(engine.given_up for engine in engines):
            faults = "\n".join(f"engine {i}: {engine.fault}" for i, engine in enumerate(engines))
            raise RuntimeError(
                f"all {len(engines)} rollout engines died more than rollout.max_restarts="
                f"{self.config.max_restarts} times without an answer in between:\n{faults}"
            )

    async def take_events(self) -> list[str]:
        """What happened to engines since the last call, a line each."""
        events, self._events = self._events, []
        return events

    async def status(self) -> list[dict[str, Any]]:
        """Of each engine: state, incarnation, outstanding tokens, last fault, actor."""
        return [
            {
                "state": engine.state.value,
                "incarnation": engine.incarnation,
                "outstanding": engine.outstanding,
                "fault": engine.fault,
                "actor": self._actors.get(number),
            }
            for number, engine in enumerate(self.router.engines)
        ]

    async def stop(self) -> None:
        """End all engines; returns when their processes are gone."""
        for supervisor in self._supervisors:
            supervisor.cancel()
        await asyncio.gather(*self._supervisors, return_exceptions=True)
        await asyncio.gather(*(self._remove(number) for number in list(self._actors)))
        ray.util.remove_placement_group(self._group)

    async def _place(self) -> None:
        """One bundle a node, on nodes of their own."""
        config = self.config
        bundle = {"CPU": float(config.cpus * config.engines_per_node)}
        if config.node_resource is not None:
            bundle[config.node_resource] = 1.0
        self._group = placement_group([bundle] * config.nodes, strategy="STRICT_SPREAD")
        try:
            async with asyncio.timeout(config.start_timeout):
                await self._group.ready()
        except TimeoutError:
            nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            raise RuntimeError(
                f"Ray found no room for {config.engines} engines within {config.start_timeout} s: "
                f"rollout.nodes={config.nodes} times {bundle} is asked for, and its nodes have "
                f"{nodes}; lower rollout.engines or rollout.cpus, or add nodes"
            ) from None

    def _create(self, number: int) -> Any:
        node, slot = divmod(number, self.config.engines_per_node)
        options = {
            "num_cpus": self.config.cpus,
            "max_restarts": 0,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                self._group, placement_group_bundle_index=node
            ),
        }
        if self.server is None:
            actor = ray.remote(AsyncLocalEngine).options(**options)
            return actor.remote(self.model, self.seed)
        tensor = self.config.tensor
        incarnation = self.router.engines[number].incarnation
        return (
            ray.remote(Server)
            .options(**options)
            .remote(
                self.server,
                log=self.logs / f"engine_{number}_{incarnation}.log",
                gpus=self.config.gpus[slot * tensor : (slot + 1) * tensor],
                interface=self.config.interface,
                health_timeout=self.config.health_timeout,
            )
        )

    async def _supervise(self, number: int) -> None:
        """Start the engine and watch it until it is dead, as often as it may be restarted."""
        engine = self.router.engines[number]
        has_been_up = False
        try:
            while True:
                await self.router.until(lambda: not self._asleep)
                self.router.restart(number)
                started = time.monotonic()
                fault = await self._start(number)
                if fault:
                    self.router.died(number, fault)
                else:
                    seconds = time.monotonic() - started
                    self._event(number, f"is up after {seconds:.1f} s (start {engine.incarnation})")
                    await self._watch(number)
                    has_been_up = True
                self._event(number, f"is dead: {engine.fault}")
                await self._remove(number)
                # what never came up has a wrong configuration, which a restart does not mend
                if not has_been_up or engine.restarts >= self.config.max_restarts:
                    break
        except Exception:
            # a defect of ours: the engine can't be trusted to anybody any more
            if engine.state is not EngineState.DEAD:
                self.router.died(number, traceback.format_exc())
            self._event(number, f"is given up: {engine.fault}")
            if number in self._actors:
                await self._remove(number)
        self.router.give_up(number)

    async def _start(self, number: int) -> str:
        """Start the engine; why it failed, or an empty string."""
        actor = self._actors[number] = self._create(number)
        self._awake.add(number)
        try:
            limit = PROCESS_SECONDS + self.config.start_timeout
            try:
                async with asyncio.timeout(limit) as waiting:
                    address = await actor.start.remote(self.config.start_timeout)
            except TimeoutError:
                # the actor's own is one, too, in Ray's words
                if not waiting.expired():
                    raise
                return (
                    f"it did not start within {limit:.0f} s: Ray has no node for it, or its actor "
                    "hangs (`ray status` lists nodes and what waits for one)"
                )
            # once more where the next sleep comes while it wakes
            while self._asleep:
                await actor.sleep.remote()
                self._awake.discard(number)
                self.router.notify()
                await self.router.until(lambda: not self._asleep)
                self._awake.add(number)
                await actor.wake.remote("weights")
                await actor.wake.remote("kv_cache")
        except Exception as error:
            return f"it did not start: {in_words(error)}"
        self.router.is_up(number, address or actor)
        return ""

    async def _watch(self, number: int) -> None:
        """Check the engine's health regularly, and at once when a request failed, until it dies."""
        engine = self.router.engines[number]
        lease = Lease(number, engine.incarnation, 0, engine.address)
        while engine.state is not EngineState.DEAD:
            news = partial(_has_news, engine, dict(engine.health.failures))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.config.health_interval):
                    await self.router.until(news)
            await self._check(lease)

    async def _check(self, lease: Lease, *, ask_health: bool = True) -> int | None:
        """Ask an engine for its health and version, and tell the router; None if it did not say.

        While it loads weights, only whether its process lives.
        """
        if not self._is_up(lease):
            return None
        actor, version, fault, died = self._actors[lease.engine], None, "", False
        is_loading = self._is_loading(lease)
        try:
            async with asyncio.timeout(self.config.health_timeout):
                if is_loading:
                    await actor.alive.remote()
                else:
                    if ask_health:
                        await actor.health.remote()
                    version = await actor.weight_version.remote()
        except (ActorDiedError, EngineDied) as error:
            fault, died = in_words(error), True
        except TimeoutError:
            fault = f"no answer to a health check within {self.config.health_timeout} s"
        except Exception as error:
            fault = in_words(error)
        # a rank may have said first that it is dead, and it may have a successor by now
        if not self._is_up(lease):
            return None
        if died:
            self.router.died(lease.engine, fault)
        # an answer that is missing says nothing where a load came while it was waited for
        elif version is not None or not (is_loading or self._is_loading(lease)):
            self.router.checked(lease.engine, version, fault)
        return version

    def _is_up(self, lease: Lease) -> bool:
        """Whether the process that the lease is for is still the engine's."""
        engine = self.router.engines[lease.engine]
        return engine.incarnation == lease.incarnation and engine.state in UP

    async def _remove(self, number: int) -> None:
        actor = self._actors.pop(number)
        with contextlib.suppress(Exception):
            async with asyncio.timeout(STOP_SECONDS):
                await actor.stop.remote()
        ray.kill(actor)
        self._awake.discard(number)
        self.router.notify()

    def _event(self, number: int, what: str) -> None:
        self._events.append(f"rollout engine {number} {what}")


def _has_news(engine: Engine, failures: dict[Probe, int]) -> bool:
    return engine.state is EngineState.DEAD or engine.health.failures != failures
