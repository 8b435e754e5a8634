"""What the manager does beside a sync and beside training, with stand-ins for engines' actors."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import ray

from prism_megatron.config import schema
from prism_megatron.rollout import manager
from prism_megatron.rollout.engine import EngineDied
from prism_megatron.rollout.manager import Manager

CONFIG = schema.Rollout(
    kind="sglang",
    engines=2,
    gpus=(0, 1),
    health_interval=0.01,
    health_timeout=0.02,
    max_failures=2,
    sleep=True,
)


class Actor:
    """A server. It has started once it is `ready`, tells its health while it is `idle`, is awake
    once it `wakes`, and its process ends at once or when it has `ended`."""

    def __init__(self, ready: bool) -> None:
        self.ready, self.idle, self.ended = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.wakes = asyncio.Event()
        self.idle.set()
        self.wakes.set()
        if ready:
            self.ready.set()
        self.is_dead, self.ends_at_once, self.version, self.asked = False, True, 0, 0
        self.memory = {"weights", "kv_cache"}
        self.start_fails = ""

    def __getattr__(self, name: str) -> Any:
        """As Ray's handles have methods."""
        return SimpleNamespace(remote=getattr(type(self), f"do_{name}").__get__(self))

    async def do_start(self, timeout: float) -> str:
        await self.ready.wait()
        if self.start_fails:
            raise TimeoutError(self.start_fails)
        return "address"

    async def do_alive(self) -> None:
        self.asked += 1
        if self.is_dead:
            raise EngineDied("it ended")

    async def do_health(self) -> None:
        await self.do_alive()
        await self.idle.wait()

    async def do_weight_version(self) -> int:
        return self.version

    async def do_sleep(self) -> None:
        self.memory.clear()

    async def do_wake(self, part: str) -> None:
        self.memory.add(part)
        await self.wakes.wait()

    async def do_stop(self) -> None:
        if self.ends_at_once:
            self.ended.set()
        await self.ended.wait()
        self.memory.clear()


class World:
    """A manager with two healthy engines; engines after them are ready when their test says so."""

    def __init__(self) -> None:
        self.actors: list[Actor] = []
        self.manager = Manager(CONFIG, model=Path("m"), seed=0, logs=Path("l"), server=None)

    async def open(self) -> None:
        await self.manager.start()
        await self.manager.expect(0)
        await self.manager.confirm({})
        assert self.states() == ["healthy", "healthy"]

    def create(self, number: int) -> Actor:
        self.actors.append(Actor(ready=len(self.actors) < CONFIG.engines))
        return self.actors[-1]

    def states(self) -> list[str]:
        return [engine.state.value for engine in self.manager.router.engines]

    async def until(self, reached: Callable[[], bool]) -> None:
        while not reached():
            await asyncio.sleep(0.01)


def in_world(test: Callable[[World], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    async def placed() -> None:
        pass

    async def bounded() -> None:
        world = World()
        with (
            patch.object(world.manager, "_place", placed),
            patch.object(world.manager, "_create", world.create),
            patch.object(ray, "kill", lambda actor: None),
        ):
            async with asyncio.timeout(60):
                await world.open()
                await test(world)
            for supervisor in world.manager._supervisors:
                supervisor.cancel()

    def run() -> None:
        asyncio.run(bounded())

    run.__name__ = test.__name__
    return run


async def checked(actor: Actor, times: int) -> None:
    """Wait until it was asked that often."""
    goal = actor.asked + times
    while actor.asked < goal:
        await asyncio.sleep(0.01)


@in_world
async def test_an_engine_that_loads_is_not_asked_for_its_health(world: World) -> None:
    world.actors[0].idle.clear()
    await world.manager.expect(1)
    await checked(world.actors[0], 2 * CONFIG.max_failures)
    assert world.states() == ["stale", "stale"]
    world.actors[0].idle.set()
    for actor in world.actors:
        actor.version = 1
    await world.manager.confirm({})
    assert world.states() == ["healthy", "healthy"]
    # afterwards one that hangs is noticed
    world.actors[0].idle.clear()
    await world.until(lambda: len(world.actors) == 3)


@in_world
async def test_an_engine_that_ends_while_it_loads_is_dead_at_once(world: World) -> None:
    await world.manager.expect(1)
    world.actors[0].is_dead = True
    await world.until(lambda: len(world.actors) == 3)
    assert world.states() == ["restarting", "stale"]


@in_world
async def test_an_engine_whose_weights_are_checked_is_not_asked_either(world: World) -> None:
    world.actors[0].idle.clear()
    assert [lease.engine for lease in await world.manager.begin_check()] == [0, 1]
    await checked(world.actors[0], 2 * CONFIG.max_failures)
    assert len(world.actors) == 2
    await world.manager.end_check()
    await world.until(lambda: len(world.actors) == 3)


def test_a_load_is_believed_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    @in_world
    async def run(world: World) -> None:
        monkeypatch.setattr(manager, "LOAD_SECONDS", 0.05)
        world.actors[0].idle.clear()
        await world.manager.expect(1)
        await world.until(lambda: len(world.actors) == 3)

    run()


async def does_not_return(task: asyncio.Task[None]) -> bool:
    done, _ = await asyncio.wait([task], timeout=0.2)
    return not done


@in_world
async def test_sleep_waits_for_an_engine_that_is_being_started(world: World) -> None:
    world.actors[0].is_dead = True
    await world.until(lambda: world.states() == ["restarting", "healthy"])
    asleep = asyncio.create_task(world.manager.sleep())
    assert await does_not_return(asleep)
    world.actors[2].ready.set()
    await asleep
    assert [actor.memory for actor in world.actors] == [set()] * 3
    # it takes its memory when the others have theirs, and then again gives it back
    await world.manager.wake("weights")
    assert world.actors[2].memory == set()
    world.actors[2].wakes.clear()
    await world.manager.wake("kv_cache")
    await world.until(lambda: world.actors[2].memory == {"weights"})
    asleep = asyncio.create_task(world.manager.sleep())
    assert await does_not_return(asleep)
    world.actors[2].wakes.set()
    await asleep
    assert [actor.memory for actor in world.actors] == [set()] * 3
    await world.manager.wake("kv_cache")
    await world.until(lambda: world.states()[0] == "stale")


@in_world
async def test_sleep_waits_for_the_process_of_a_dead_engine(world: World) -> None:
    world.actors[0].is_dead, world.actors[0].ends_at_once = True, False
    await world.until(lambda: world.states() == ["dead", "healthy"])
    asleep = asyncio.create_task(world.manager.sleep())
    assert await does_not_return(asleep)
    world.actors[0].ended.set()
    await asleep
    assert not world.actors[0].memory and len(world.actors) == 2


@in_world
async def test_an_engine_says_itself_why_it_did_not_start(world: World) -> None:
    world.actors[0].is_dead = True
    await world.until(lambda: len(world.actors) == 3)
    world.actors[2].start_fails = "no answer within 600 s"
    world.actors[2].ready.set()
    await world.until(lambda: len(world.actors) == 4)
    assert any("no answer within 600 s" in event for event in world.manager._events)


def test_an_engine_that_ray_finds_no_node_for_does_not_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    @in_world
    async def run(world: World) -> None:
        monkeypatch.setattr(manager, "PROCESS_SECONDS", 0.05)
        world.manager.config = CONFIG.model_copy(update={"start_timeout": 0.05, "max_restarts": 2})
        world.actors[0].is_dead = True
        # started twice, of which neither is ever ready
        await world.until(lambda: world.manager.router.engines[0].given_up)
        assert len(world.actors) == 4
        assert "Ray has no node for it" in world.manager.router.engines[0].fault

    run()
