"""Who gets which engine: load, back-pressure, what waits for what, and events that come late."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from prism_megatron.rollout.engine_state import EngineState
from prism_megatron.rollout.router import Lease, Outcome, Router

VERSION = 3
ANSWERED = Outcome(version=VERSION)


def router(engines: int, limit: int = 1000, max_failures: int = 2) -> Router:
    """All healthy; engine i is at address "ai"."""
    made = Router(engines, max_failures=max_failures, max_outstanding_tokens=limit)
    for number in range(engines):
        made.restart(number)
        made.is_up(number, f"a{number}")
    made.expect(VERSION)
    for number in range(engines):
        made.checked(number, VERSION)
    return made


def in_loop(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    def run() -> None:
        asyncio.run(asyncio.wait_for(test(), 5))

    run.__name__ = test.__name__
    return run


async def lease_of(acquired: Coroutine[Any, Any, Lease | None]) -> Lease:
    lease = await acquired
    assert lease is not None
    return lease


async def waits(task: asyncio.Task[Any]) -> bool:
    for _ in range(3):
        await asyncio.sleep(0)
    return not task.done()


@in_loop
async def test_the_engine_with_the_fewest_outstanding_tokens_is_asked() -> None:
    made = router(3)
    leases = [await lease_of(made.acquire(tokens)) for tokens in (50, 20, 30, 25, 1)]
    assert [lease.engine for lease in leases] == [0, 1, 2, 1, 2]
    assert leases[2].address == "a2"
    made.release(leases[0], ANSWERED)
    assert (await lease_of(made.acquire(1))).engine == 0


@in_loop
async def test_a_full_engine_makes_prompts_wait_in_their_order() -> None:
    made = router(1, limit=100)
    first = await lease_of(made.acquire(60))
    large = asyncio.create_task(made.acquire(90))
    small = asyncio.create_task(made.acquire(10))
    assert await waits(large)
    assert await waits(small), "a small prompt would keep a large one waiting for ever"
    made.release(first, ANSWERED)
    assert (await lease_of(large)).tokens == 90
    assert (await lease_of(small)).tokens == 10
    assert made.engines[0].outstanding == 100


@in_loop
async def test_a_prompt_above_the_limit_gets_an_idle_engine() -> None:
    made = router(1, limit=100)
    lease = await lease_of(made.acquire(250))
    other = asyncio.create_task(made.acquire(1))
    assert await waits(other)
    made.release(lease, ANSWERED)
    assert (await lease_of(other)).tokens == 1


@in_loop
async def test_a_suspect_engine_gets_nothing_until_it_answers() -> None:
    made = router(1)
    made.release(await lease_of(made.acquire(5)), Outcome(fault="slow"))
    assert made.engines[0].state is EngineState.SUSPECT
    waiting = asyncio.create_task(made.acquire(5))
    assert await waits(waiting)
    made.checked(0, VERSION)
    assert (await lease_of(waiting)).engine == 0


@pytest.mark.parametrize("end", ["died", "failed", "stale"])
def test_nobody_waits_for_engines_that_only_new_weights_can_help(end: str) -> None:
    async def test() -> None:
        made = router(2, limit=10)
        leases = [await lease_of(made.acquire(10)) for _ in range(2)]
        waiting = asyncio.create_task(made.acquire(10))
        assert await waits(waiting)
        made.died(0, "gone")
        assert await waits(waiting)
        if end == "died":
            made.release(leases[1], Outcome(fault="gone", died=True))
        elif end == "failed":
            made.checked(1, None, "slow")
            made.checked(1, None, "slow")
        else:
            made.release(leases[1], Outcome(version=VERSION - 1))
        assert await waiting is None
        assert await made.acquire(1) is None

    asyncio.run(asyncio.wait_for(test(), 5))


@in_loop
async def test_a_restarted_engine_serves_after_it_has_the_weights() -> None:
    made = router(1)
    made.died(0, "gone")
    made.restart(0)
    made.is_up(0, "new")
    assert await made.acquire(1) is None
    [lease] = made.expect(VERSION)
    assert (lease.engine, lease.incarnation, lease.address) == (0, 2, "new")
    made.checked(0, VERSION)
    assert (await lease_of(made.acquire(1))).address == "new"


@in_loop
async def test_what_comes_late_says_nothing_about_the_new_process() -> None:
    made = router(1)
    old = await lease_of(made.acquire(5))
    older = await lease_of(made.acquire(6))
    made.died(0, "gone")
    assert made.engines[0].outstanding == 0
    made.release(older, Outcome(fault="gone", died=True))
    made.restart(0)
    made.is_up(0, "new")
    made.expect(VERSION)
    made.checked(0, VERSION)
    new = await lease_of(made.acquire(7))
    made.release(old, Outcome(fault="gone", died=True))
    assert made.engines[0].state is EngineState.HEALTHY
    assert made.engines[0].outstanding == 7
    made.release(new, ANSWERED)
    assert made.engines[0].outstanding == 0


@in_loop
async def test_restarts_are_counted_until_a_request_is_answered() -> None:
    made = router(1)
    assert made.engines[0].restarts == 0
    for count in (1, 2):
        made.died(0, "gone")
        made.restart(0)
        made.is_up(0, "new")
        made.expect(VERSION)
        made.checked(0, VERSION)
        assert made.engines[0].restarts == count
    made.release(await lease_of(made.acquire(1)), ANSWERED)
    assert made.engines[0].restarts == 0


@in_loop
async def test_new_weights_wait_for_all_prompts() -> None:
    made = router(2)
    lease = await lease_of(made.acquire(5))
    with pytest.raises(AssertionError, match=r"outstanding tokens: \{0: 5\}"):
        made.expect(VERSION + 1)
    made.release(lease, Outcome())
    assert [lease.engine for lease in made.expect(VERSION + 1)] == [0, 1]
    assert [engine.state for engine in made.engines] == [EngineState.STALE] * 2


@in_loop
async def test_who_gives_up_waiting_takes_no_engine() -> None:
    made = router(1, limit=10)
    lease = await lease_of(made.acquire(10))
    given_up = asyncio.create_task(made.acquire(10))
    too_late = asyncio.create_task(made.acquire(10))
    assert await waits(too_late)
    given_up.cancel()
    assert await waits(too_late)
    made.release(lease, ANSWERED)
    # the lease has been given, but its task has not run yet
    too_late.cancel()
    assert not await waits(too_late)
    assert too_late.cancelled()
    assert made.engines[0].outstanding == 0
