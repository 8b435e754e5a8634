"""A fleet of engines that Ray places and watches, as each trainer rank has it.

 every rank:  own prompts --> lease from the manager --> engine --> n rollouts, checked
                 ^                                         | failed, died, timed out, stale weights
                 +------------ once more, elsewhere -------+
 no engine can serve --> all ranks meet --> wait for a restarted one --> refit --> go on with the
 rest

A prompt gets exactly its n rollouts, sampled with the weights of the last sync, whatever engines
did meanwhile: an answer counts once it is complete, and nothing is kept of a failed request. With
rollout.partial a sync interrupts what is out, and each rollout goes on behind its own beginning.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import signal
import socket
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import ray
import torch
import torch.distributed as dist
from ray.exceptions import ActorDiedError
from torch import Tensor

from prism_megatron.config import schema
from prism_megatron.config.schema import Sampling
from prism_megatron.rollout.actors import ActorClient, in_words
from prism_megatron.rollout.engine import EngineClient, EngineDied, request_keys
from prism_megatron.rollout.fleet import (
    Answered,
    Weights,
    merge_shares,
    own_place,
    own_share,
)
from prism_megatron.rollout.manager import Manager
from prism_megatron.rollout.router import Lease, Outcome
from prism_megatron.rollout.server import ServerKind
from prism_megatron.rollout.weight_check import Action
from prism_megatron.rollout.weight_sync import SyncFailed
from prism_megatron.types import Prompt, Rollout

NAMESPACE = "prism_megatron"
STOP_SECONDS = 30
ABORT_SECONDS = 1

Refit = Callable[[Sequence[Lease], int], dict[str, float]]
"""Gives the engines behind the leases the policy's weights of now, as a version; all ranks call it.
Returns seconds by phase. An engine that fails meanwhile may be left out, since each is asked for
its version afterwards, or be named by SyncFailed, on every rank."""


class WrongAnswer(RuntimeError):
    """The engine answered, but not what it was asked for."""


@dataclass
class _Job:
    """One prompt, and what became of the attempts to have it answered; begun: its rollouts where a
    sync interrupted some of them."""

    index: int
    prompt: Prompt
    key: str
    faults: list[str] = field(default_factory=list)
    begun: list[Rollout] = field(default_factory=list)


@dataclass
class _Work:
    """The prompts of one call on this rank: those still to be answered, and the answers; count: of
    all ranks' prompts; answered: see Fleet.submit."""

    sampling: Sampling
    jobs: deque[_Job]
    answers: list[Any]
    count: int
    answered: Answered | None
    interrupted: bool = False


def check_reachable(config: schema.Rollout, hosts: Sequence[str]) -> None:
    """ValueError if servers would listen where ranks do not reach them. hosts: of each rank."""
    if config.interface is None and (len(set(hosts)) > 1 or config.nodes > 1):
        raise ValueError(
            f"{config.kind} servers on {config.nodes} nodes listen on loopback, which ranks on "
            f"{len(set(hosts))} hosts ({', '.join(sorted(set(hosts))[:8])}) do not all reach; set "
            "rollout.interface to the network interface between them"
        )


class RayFleet:
    """See the top of this file, and Fleet."""

    def __init__(
        self,
        config: schema.Rollout,
        refit: Refit,
        *,
        model: Path,
        seed: int,
        logs: Path,
        server: ServerKind | None = None,
        release: Callable[[], None] = lambda: None,
    ) -> None:
        """Start Ray, unless RAY_ADDRESS names a running one, and all engines; all ranks together.

        model, seed: of the LocalEngine actors; server: what to start instead of them; logs: folder
        that gets the servers' output; release: see fleet.build. RuntimeError if an engine does not
        start.
        """
        self.config, self._refit, self._release = config, refit, release
        if config.sleep:
            release()
        self._server = server
        self._manager: Any = None
        self.weight_version = -1
        self.restarts = 0
        # ranks wait for the slowest one and for restarts, longer than any training collective
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=config.patience))
        if server is not None:
            hosts: list[str] = [""] * dist.get_world_size()
            dist.all_gather_object(hosts, socket.gethostname(), group=self._group)
            check_reachable(config, hosts)
        address, name = self._first(lambda: self._start(model, seed, logs))
        if not self._is_first:
            if not ray.is_initialized():
                _connect(address=address)
            self._manager = ray.get_actor(name, namespace=NAMESPACE)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._clients: dict[int, tuple[int, EngineClient]] = {}
        self._work: _Work | None = None
        self._running: Future[None] | None = None
        atexit.register(self.close)

    def sync(self, version: int) -> dict[str, float]:
        """See Fleet: engines that are up get the weights, those that confirm serve."""
        started = time.perf_counter()
        if self._work is not None and self._running is not None:
            self._interrupt(self._work)
        self._first(lambda: self._ask(self._manager.expect, version))
        if self.config.sleep:
            self._release()
            dist.barrier(self._group)
            self._first(lambda: self._ask(self._manager.wake, "weights"))
        leases = self._ask(self._manager.refitting)
        phases, broken = self._try_refit(leases, version)
        if self.config.sleep:
            self._first(lambda: self._ask(self._manager.wake, "kv_cache"))
        self._first(lambda: self._ask(self._manager.confirm, broken))
        self.restarts = self._first(lambda: self._ask(self._manager.restarts))
        self.weight_version = version
        self._report()
        if self._work is not None:
            self._running = self._run(self._play(self._work))
        return phases | {"total": time.perf_counter() - started}

    def _try_refit(
        self, leases: Sequence[Lease], version: int
    ) -> tuple[dict[str, float], dict[int, str]]:
        """Seconds by phase, and the engines that it broke."""
        try:
            return self._refit(leases, version), {}
        except SyncFailed as error:
            if self._is_first:
                print(error, file=sys.stderr, flush=True)
            return {}, error.broken

    def sleep(self) -> dict[str, float]:
        """See Fleet."""
        if not self.config.sleep:
            return {}
        started = time.perf_counter()
        assert self._running is None, "engines can't sleep while prompts are out"
        self._first(lambda: self._ask(self._manager.sleep))
        return {"sleep_s": time.perf_counter() - started} | self._free_memory()

    def _free_memory(self) -> dict[str, float]:
        """What the GPU with the least has for training."""
        if not torch.accelerator.is_available():
            return {}
        free: list[Any] = [None] * dist.get_world_size()
        mine = torch.accelerator.get_memory_info()[0] / 2**30
        dist.all_gather_object(free, mine, group=self._group)
        return {"free_gib": min(free)}

    def readmit(self) -> None:
        """See Fleet."""
        if self._first(lambda: self._ask(self._manager.is_any_stale)):
            self.sync(self.weight_version)

    def check(self, action: Action) -> list[str]:
        """See Fleet."""

        async def ask(lease: Lease) -> str:
            try:
                await (await self._client(lease)).check(action)
            except Exception as error:
                return f"engine {lease.engine}: {in_words(error)}"
            return ""

        async def ask_all() -> list[str]:
            leases = await self._manager.begin_check.remote()
            try:
                return [words for words in await asyncio.gather(*map(ask, leases)) if words]
            finally:
                await self._manager.end_check.remote()

        found: list[str] = self._first(
            lambda: asyncio.run_coroutine_threadsafe(ask_all(), self._loop).result()
        )
        return found

    def submit(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        step: int,
        answered: Answered | None = None,
    ) -> None:
        """See Fleet: each rank has its share of the prompts answered, in the background."""
        assert self._work is None, "the prompts of the last submit() were not collected"
        if self.weight_version < 0:
            raise RuntimeError("the rollout engines have no weights yet: call sync first")
        mine = own_share(prompts)
        keys = request_keys(mine, step)
        jobs = deque(_Job(i, p, k) for i, (p, k) in enumerate(zip(mine, keys, strict=True)))
        self._work = _Work(sampling, jobs, [None] * len(mine), len(prompts), answered)
        self._running = self._run(self._play(self._work))

    def collect(self, version: int) -> list[list[Rollout]]:
        """See Fleet.

        RuntimeError if a prompt fails on rollout.max_attempts engines, or no engine is left;
        ValueError if an engine says that a prompt can't be sampled from.
        """
        assert self._work is not None, "nothing was submitted"
        work = self._work
        left, attempts = -1, 0
        while now := self._left(work):
            # the same number once more: no engine could serve with what the last sync gave it
            left, attempts = now, attempts + 1 if now == left else 1
            if attempts > self.config.max_attempts:
                self._report()
                raise RuntimeError(
                    f"{left} prompts are unanswered: no engine has weights of version "
                    f"{self.weight_version} after {self.config.max_attempts} syncs in a row "
                    "(rollout.max_attempts); stderr says what engines answered"
                )
            self._first(lambda: self._ask(self._manager.wait_for_engine))
            self.sync(version)
        self._work = None
        self._report()
        assert all(answer is not None for answer in work.answers)
        return merge_shares(work.answers, work.count, self._group)

    def close(self) -> None:
        """Cancel what is out and end the engines; the fleet is of no use afterwards."""
        if self._loop.is_closed():
            return
        atexit.unregister(self.close)
        self._run(self._cancel()).result(STOP_SECONDS)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(STOP_SECONDS)
        self._loop.close()
        if self._is_first and ray.is_initialized():
            with contextlib.suppress(ActorDiedError):
                ray.get(self._manager.stop.remote(), timeout=STOP_SECONDS)
            ray.kill(self._manager)

    def _start(self, model: Path, seed: int, logs: Path) -> tuple[str, str]:
        """First rank: start Ray and all engines; Ray's address and the manager's name."""
        if not ray.is_initialized():
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            # of 30 s, a busy host or a cold file system needs more
            os.environ.setdefault("RAY_raylet_start_wait_time_s", "180")
            own: dict[str, Any] = {}
            if "RAY_ADDRESS" not in os.environ:
                # a head of our own does not come back: this rank ends soon after it, and the
                # launcher starts the run again
                os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", "5")
                resources = {self.config.node_resource: 1} if self.config.node_resource else {}
                own = {
                    "address": "local",
                    "num_cpus": self.config.cpus * self.config.engines,
                    "resources": resources,
                    "include_dashboard": False,
                }
            _connect(**own)
        name = f"fleet-{uuid.uuid4().hex}"
        # every rank may wait in `acquire` while others report
        options = {"num_cpus": 0, "max_concurrency": 1000 + 2 * dist.get_world_size()}
        self._manager = (
            ray.remote(Manager)
            .options(name=name, namespace=NAMESPACE, **options)
            .remote(self.config, model=model, seed=seed, logs=logs, server=self._server)
        )
        self._ask(self._manager.start)
        return ray.get_runtime_context().gcs_address, name

    async def _cancel(self) -> None:
        """Cancel what is out, and let go of connections."""
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for _, client in self._clients.values():
            await client.close()

    def _interrupt(self, work: _Work) -> None:
        """Have engines return what they have sampled so far, which stays in work.jobs."""
        assert self._running is not None
        work.interrupted = True
        # engines are asked for all ranks: none may think that it was cut off for no reason
        dist.barrier(self._group)
        ended = False
        while not ended:
            # once more for requests that had not arrived
            self._first(self._abort)
            with contextlib.suppress(FutureTimeout):
                self._running.exception(ABORT_SECONDS)
            reports: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(reports, self._running.done(), group=self._group)
            ended = all(reports)
        # errors, here or on another rank; answers that are missing are what collect waits for
        self._left(work)
        work.interrupted = False

    def _abort(self) -> None:
        async def abort_all() -> None:
            for lease in await self._manager.up.remote():
                # a dead engine's requests end by themselves
                with contextlib.suppress(Exception):
                    await (await self._client(lease)).abort()

        asyncio.run_coroutine_threadsafe(abort_all(), self._loop).result()

    async def _play(self, work: _Work) -> None:
        """Until every job is answered, interrupted, or no engine can serve; what is left stays in
        work.jobs."""
        running: set[asyncio.Task[None]] = set()
        async with asyncio.TaskGroup() as tasks:
            while (work.jobs and not work.interrupted) or running:
                if work.interrupted:
                    await asyncio.wait(running)
                    continue
                if not work.jobs:
                    await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                    continue
                # one question at a time, so that ranks get engines in turn
                lease = await self._manager.acquire.remote(_cost(work.jobs[0], work.sampling))
                if lease is None:
                    if running:
                        await asyncio.wait(running)
                    return
                task = tasks.create_task(self._answer(work, work.jobs.popleft(), lease))
                running.add(task)
                task.add_done_callback(running.discard)

    async def _answer(self, work: _Work, job: _Job, lease: Lease) -> None:
        """Have one job answered by the leased engine, or put it back."""
        outcome = Outcome()
        try:
            client = await self._client(lease)
            async with asyncio.timeout(self.config.request_timeout):
                rollouts = await _generate(client, job, work.sampling)
            outcome = self._judge(rollouts, work)
        except ValueError as error:
            raise ValueError(str(getattr(error, "cause", error))) from error
        except EngineDied as error:
            outcome = Outcome(fault=str(error), died=True)
        except TimeoutError:
            outcome = Outcome(fault=f"no answer within {self.config.request_timeout} s")
        except Exception as error:
            outcome = Outcome(fault=in_words(error))
        finally:
            await self._manager.release.remote(lease, outcome)
        fault = outcome.fault
        if not fault and outcome.version != self.weight_version:
            fault = f"weights of version {outcome.version}"
        elif not fault:
            cut = sum(rollout.finish_reason == "abort" for rollout in rollouts)
            if not cut:
                work.answers[job.index] = rollouts
                if work.answered is not None:
                    work.answered(own_place(job.index), rollouts)
                return
            if self.config.partial:
                job.begun = rollouts
            if work.interrupted:
                work.jobs.append(job)
                return
            # somebody else had it cut off: no fault of the engine's, but it must not go on for ever
            fault = f"{cut} of {len(rollouts)} rollouts were cut off"
        job.faults.append(f"engine {lease.engine}: {fault}")
        if len(job.faults) >= self.config.max_attempts:
            faults = "\n".join(job.faults)
            raise RuntimeError(
                f"row {job.prompt.row_id} got no answer in {len(job.faults)} attempts "
                f"(rollout.max_attempts):\n{faults}"
            )
        work.jobs.append(job)

    def _judge(self, rollouts: list[Rollout], work: _Work) -> Outcome:
        """Whether they are what was asked for; a version other than the present one counts too."""
        asked = work.sampling.n
        if len(rollouts) != asked:
            raise WrongAnswer(f"{len(rollouts)} rollouts came, {asked} were asked for")
        versions = {rollout.weight_version for rollout in rollouts}
        # those that were complete before an interruption are older than the others
        if len(versions) > 1 and self.config.partial:
            versions = {max(versions)}
        if len(versions) > 1:
            raise WrongAnswer(f"the rollouts of one prompt have weight versions {versions}")
        return Outcome(version=versions.pop())

    async def _client(self, lease: Lease) -> EngineClient:
        """The connection to the leased engine; made anew when the engine was."""
        incarnation, client = self._clients.get(lease.engine, (-1, None))
        if client is None or incarnation != lease.incarnation:
            connect = ActorClient if self._server is None else self._server.connect
            stale, client = client, connect(lease.address)
            self._clients[lease.engine] = lease.incarnation, client
            if stale is not None:
                await stale.close()
        return client

    def _left(self, work: _Work) -> int:
        """Prompts that are unanswered over all ranks; an error of any rank stops all of them."""
        assert self._running is not None
        error: BaseException | None = None
        try:
            self._running.result()
        except ExceptionGroup as group:
            error = group.exceptions[0]
        except Exception as other:
            error = other
        self._running = None
        words = in_words(error) if error else ""
        reports: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(reports, (len(work.jobs), words), group=self._group)
        if error:
            raise error
        for rank, (_, theirs) in enumerate(reports):
            if theirs:
                raise RuntimeError(f"rank {rank} could not sample: {theirs}")
        return sum(left for left, _ in reports)

    @property
    def _is_first(self) -> bool:
        return dist.get_rank() == 0

    def _first(self, call: Callable[[], Any]) -> Any:
        """Call on the first rank; its result, or its error, on all."""
        result: list[Any] = [None, ""]
        if self._is_first:
            try:
                result[0] = call()
            except Exception as error:
                dist.broadcast_object_list([None, str(error)], group=self._group)
                raise
        dist.broadcast_object_list(result, group=self._group)
        value, words = result
        if words:
            raise RuntimeError(f"rank 0 could not go on: {words}")
        return value

    def _ask(self, method: Any, *arguments: Any) -> Any:
        """Call the manager; its own error if it raises one."""
        try:
            return ray.get(method.remote(*arguments))
        except ray.exceptions.RayTaskError as error:
            raise getattr(error, "cause", error) from None

    def _run(self, coroutine: Coroutine[Any, Any, None]) -> Future[None]:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def _report(self) -> None:
        """Print what happened to engines, once for all ranks."""
        if self._is_first:
            for event in self._ask(self._manager.take_events):
                print(event, file=sys.stderr, flush=True)


def _connect(**options: Any) -> None:
    """Start or join Ray, without its handler of SIGTERM, which would end the process as failed."""
    handler = signal.getsignal(signal.SIGTERM)
    ray.init(log_to_driver=False, **options)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


def send_through_ray(weights: Weights) -> Refit:
    """Refit of AsyncLocalEngine actors: Ray's object store carries the weights from rank 0."""

    def refit(leases: Sequence[Lease], version: int) -> dict[str, float]:
        is_first = dist.get_rank() == 0
        # all ranks take part in collecting the full tensors, one of them keeps them
        tensors = [(name, _copied(tensor)) for name, tensor in weights() if is_first]
        if not is_first:
            return {}
        sent = ray.put(tensors)
        loading = [lease.address.load_weights.remote(sent, version) for lease in leases]
        for load in loading:
            with contextlib.suppress(ActorDiedError):
                ray.get(load)
        return {}

    return refit


async def _generate(client: EngineClient, job: _Job, sampling: Sampling) -> list[Rollout]:
    """The job's rollouts, each from where it was interrupted."""
    if not job.begun:
        return await client.generate(job.prompt, sampling, job.key)

    async def complete(number: int, rollout: Rollout) -> Rollout:
        if rollout.finish_reason != "abort":
            return rollout
        longer = replace(job.prompt, input_ids=job.prompt.input_ids + rollout.ids)
        left = sampling.max_new_tokens - len(rollout.ids)
        rest = sampling.model_copy(update={"n": 1, "max_new_tokens": left})
        key = f"{job.key}/{number}/{len(rollout.ids)}"
        [found] = await client.generate(longer, rest, key)
        return rollout.followed_by(found)

    return list(await asyncio.gather(*map(complete, *zip(*enumerate(job.begun), strict=True))))


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def _cost(job: _Job, sampling: Sampling) -> int:
    """The most tokens that a prompt and its responses can take."""
    return len(job.prompt.input_ids) + sampling.n * sampling.max_new_tokens
