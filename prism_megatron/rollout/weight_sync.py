"""Carries the policy's weights into the rollout engines.

    shards of every rank --WeightPlan--> a bucket of whole tensors, in one of two buffers
        engine in this process         copied
        engine on the trainers' GPUs   its rank on the same GPU maps the buffer (CUDA IPC), copies
        engine on other GPUs           rank 0 broadcasts the buffer (NCCL)
        any other engine               rank 0 writes a Hugging Face directory, the engine reads it

    weights that nobody trains: the engine reads the Hugging Face directory that is there

Fused experts are sent as engines hold them (fused_experts.py).
Weights for engines that hold them quantised are quantised as a bucket is gathered.
While an engine loads one bucket, the trainers gather the next. A sync ends with every engine
answering with the new version; one that does not stops the run, since its rollouts would be
credited to the wrong weights.
"""

from __future__ import annotations

import shutil
import socket
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist
import zmq
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor

from checkpoint_tools import hf_writer
from model_providers.memory import SYNC_BUCKET
from model_providers.qwen3_vl import Qwen3VLModel
from model_providers.weight_plan import Bucket, Quantization, WeightPlan
from prism_megatron.rollout import fused_experts, outer_group
from prism_megatron.rollout.engine import RolloutEngine

LEAVE_SECONDS = 30
_SENDER = "rank 0"


class Server(Protocol):
    """An engine in processes of its own: prism_megatron.rollout.sglang.SGLangEngine."""

    url: str

    def version(self) -> int: ...
    def settle(self) -> None: ...
    def pause(self) -> None: ...
    def resume(self) -> None: ...
    def load_ipc(self, handles: Mapping[str, str], version: int) -> None: ...
    def join_group(
        self, address: str, port: int, first_rank: int, world: int, name: str, backend: str
    ) -> None: ...
    def leave_group(self, name: str) -> None: ...
    def load_broadcast(
        self, tensors: Sequence[tuple[str, Tensor]], name: str, version: int | None
    ) -> None: ...
    def load_disk(self, hf_dir: Path, version: int) -> None: ...


class SyncFailed(RuntimeError):
    """New weights did not get to some engine, which every rank learns alike.

    broken: what went wrong with the engines of which nobody knows what weights they have, or
    whether they sample; only a new start mends them. The others tell the version that they have.
    """

    def __init__(self, words: str, broken: Mapping[int, str]) -> None:
        super().__init__(words)
        self.broken = dict(broken)


class WeightSync(Protocol):
    """One way of getting weights from the trainers to engines that are servers."""

    def sync(self, servers: Mapping[int, Server], version: int) -> dict[str, float]:
        """Load the policy's weights into the engines that are up; every trainer rank calls this.

        Returns the seconds of each phase, "total" among them, when the engines sample with the new
        weights. SyncFailed, on every rank, if an engine failed or answers with another version.
        """
        ...


@dataclass(frozen=True)
class InProcessSync:
    """The engine lives in the trainer's process."""

    engine: RolloutEngine

    def sync(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> dict[str, float]:
        """Load the weights and make sure that the engine answers with their version.

        Seconds by phase. RuntimeError if it answers with another version.
        """
        started = time.perf_counter()
        self.engine.load_weights(named_tensors, version)
        _check_version(self.engine.weight_version, version, "the embedded engine")
        return {"total": time.perf_counter() - started}


class _Phases:
    """Seconds by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._started = time.perf_counter()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    def result(self) -> dict[str, float]:
        return self.seconds | {"total": time.perf_counter() - self._started}


class IpcSync:
    """Engines on the trainers' own GPUs, in processes of their own.

    Each engine rank shares its GPU with one trainer rank and loads from that rank's memory, by the
    protocol of checkpoint-engine (PyPI; worker.update_weights_from_ipc), which SGLang speaks by
    itself and vLLM with that package's worker extension. The engine's environment needs the
    package, the trainer does not.
    """

    def __init__(
        self,
        model: Qwen3VLModel,
        ranks: Mapping[int, Sequence[int]],
        *,
        quantization: Quantization | None = None,
        bucket_bytes: int = SYNC_BUCKET,
        timeout_seconds: float = 300,
    ) -> None:
        """ranks: for each engine the trainer ranks on whose GPUs it runs, the first of which talks
        to it. Every rank calls this with the same."""
        self.backend, self.timeout = model.backend, timeout_seconds
        self.ranks = {engine: list(members) for engine, members in ranks.items()}
        receivers = sorted(rank for members in self.ranks.values() for rank in members)
        self.plan = WeightPlan(
            model,
            receivers=receivers,
            bucket_bytes=bucket_bytes,
            cut_experts=True,
            quantization=quantization,
        )
        self._settled: list[Server] = []

    def sync(self, servers: Mapping[int, Server], version: int) -> dict[str, float]:
        """See WeightSync."""
        phase, rank = _Phases(), dist.get_rank()
        members = {e: self.ranks[e] for e in servers if rank in self.ranks[e]}
        leads = {e: servers[e] for e, ranks in members.items() if rank == ranks[0]}
        folder = Path(tempfile.mkdtemp(prefix="prism-sync-"))  # readable by this user alone
        address = f"ipc://{folder}/bucket"
        with phase("pause"):
            handles: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(handles, (self.backend.device_uuid(), address))
            error = "; ".join(_each(leads, self._pause).values())
        lent = dict(handles[member] for group in members.values() for member in group)
        # an engine that is broken may never answer, and is not waited for
        loading = [_begin(partial(s.load_ipc, lent, version)) for s in leads.values()]
        lender = _Lender(address, loading, self.timeout, error) if members else None
        try:
            self._run(lender, phase)
        except BaseException as failure:
            # of this rank alone, which ends of it; its engine is told, and does not wait for more
            if lender:
                lender.error = lender.error or _in_words(failure)
            raise
        finally:
            if lender:
                lender.abandon()
                error = lender.error
            shutil.rmtree(folder)
        with phase("resume"):
            _resume(leads, version, dict.fromkeys(members, error) if error else {})
        return phase.result()

    def _pause(self, server: Server) -> None:
        if server not in self._settled:
            server.settle()
            self._settled.append(server)
        server.pause()

    def _run(self, lender: _Lender | None, phase: _Phases) -> None:
        size = max(bucket.nbytes for bucket in self.plan.buckets)
        with phase("buffers"):
            whole = self.backend.shareable(2 * size) if lender else None
            if lender and whole is not None:
                lender.run(partial(lender.open, whole))
        for index, bucket in enumerate(self.plan.buckets):
            offset = index % 2 * size
            with phase("gather"):
                self.plan.fill(bucket, None if whole is None else whole[offset : offset + size])
                # the engine is another process and knows nothing of our stream
                self.backend.synchronize()
            if lender:
                with phase("load"):
                    lender.run(lender.wait)
                    lender.run(partial(lender.lend, bucket, offset))
        if lender:
            with phase("load"):
                lender.run(lender.wait)
            with phase("finish"):
                lender.run(lender.close)


class _Lender:
    """One trainer rank's side of checkpoint-engine's protocol: a request, an empty answer.

    After an error nothing more is sent, but the rank goes on taking part in the gathering, so that
    all ranks come to the end and learn of it.
    """

    def __init__(
        self, address: str, loading: Sequence[Future[None]], timeout: float, error: str
    ) -> None:
        """loading: the engine's update, on the rank that talks to it."""
        self.loading, self.timeout, self.error = loading, timeout, error
        self.socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.REQ)
        self.socket.bind(address)

    def run(self, action: Callable[[], None]) -> None:
        """Do it unless there was an error; keep the error."""
        self.error = self.error or _try(action)

    def open(self, buffer: Tensor) -> None:
        """Hand over the memory that all buckets come in."""
        self._send(reduce_tensor(buffer))

    def lend(self, bucket: Bucket, offset: int) -> None:
        """Have the bucket loaded that lies `offset` bytes into the memory."""
        self._send(
            [
                {
                    "name": fused_experts.sent_name(tensor.name),
                    "shape": tensor.shape,
                    "dtype": tensor.dtype,
                    "offset": offset + tensor.offset,
                }
                for tensor in bucket.tensors
            ]
        )

    def wait(self) -> None:
        """Until the engine has done what was sent last."""
        self._until(zmq.POLLIN)
        if answer := self.socket.recv():
            raise RuntimeError(answer.decode())

    def _send(self, message: object) -> None:
        self._until(zmq.POLLOUT)  # an engine is there to take it
        # torch's own pickler, which passes memory on instead of copying what is in it
        self.socket.send(ForkingPickler.dumps(message))

    def _until(self, ready: int) -> None:
        waited = 0.0
        while not self.socket.poll(100, ready):
            waited += 0.1
            if any(update.done() for update in self.loading):
                self._ended()
                raise RuntimeError("the engine ended the update before it got all weights")
            if waited > self.timeout:
                raise TimeoutError(f"nothing from the engine for {self.timeout:.0f} s")

    def abandon(self) -> None:
        """Let go of the engine, which waits for more after an error."""
        if self.error:
            self.timeout = min(self.timeout, LEAVE_SECONDS)
            with suppress(Exception):  # it may be gone
                # it may owe an answer, before which nothing can be sent
                self._until(zmq.POLLIN | zmq.POLLOUT)
                if self.socket.poll(0, zmq.POLLIN):
                    self.socket.recv()
                self.socket.send_pyobj(RuntimeError(self.error), zmq.NOBLOCK)
        self.socket.close(linger=1000 if self.error else 0)

    def close(self) -> None:
        """Have the memory released, then have the engine do what follows a load."""
        for _ in range(2):
            self._send(None)
            self.wait()
        self._ended()

    def _ended(self) -> None:
        for update in self.loading:
            update.result(self.timeout)


class BroadcastSync:
    """Engines on GPUs of their own, which rank 0 sends to over NCCL.

    NCCL waits for ever for a rank that died while the group was made, or before the first
    broadcast. So rank 0 waits for the servers' answers and does its own part in threads, which it
    leaves behind when a server fails.
    """

    def __init__(
        self,
        model: Qwen3VLModel,
        engine_ranks: int,
        *,
        host: str = "127.0.0.1",
        quantization: Quantization | None = None,
        bucket_bytes: int = SYNC_BUCKET,
        timeout_seconds: float = 300,
    ) -> None:
        """engine_ranks: GPUs of each engine; host: address of rank 0's host as engines reach it;
        timeout_seconds: how long joining and each bucket may take. Every rank calls this."""
        self.backend, self.engine_ranks, self.host = model.backend, engine_ranks, host
        self.timeout = timeout_seconds
        self.plan = WeightPlan(
            model,
            receivers=[0],
            bucket_bytes=bucket_bytes,
            cut_experts=True,
            quantization=quantization,
        )
        self._joined: list[Server] = []
        self._group: Future[dist.ProcessGroup] | None = None
        self._name = ""

    def _join(self, servers: list[Server]) -> dict[str, str]:
        """Make a group with these servers, which a restarted one is not in yet, also where it got
        its predecessor's port; see _finish."""
        if not servers or self._joined == servers:
            return {}
        self.leave()
        # not what the host's own name leads to, which is loopback on many hosts
        host, port = self.host, _free_port()
        world = 1 + self.engine_ranks * len(servers)
        # a server may be in a group of a trainer that was started again
        self._joined, self._name = servers, f"prism_megatron_{uuid.uuid4().hex}"
        backend = self.backend.process_group_backend
        # longer than servers may take, whose answers say more; NCCL would end this process then
        patience = 2 * self.timeout
        self._group = _begin(
            partial(outer_group.join, host, port, world, 0, self._name, backend, patience)
        )
        joining: dict[Future[Any], str] = {self._group: _SENDER}
        for i, server in enumerate(servers):
            first = 1 + i * self.engine_ranks
            join = partial(server.join_group, host, port, first, world, self._name, backend)
            joining[_begin(join)] = server.url
        return self._finish(joining, f"joined the group of {world} ranks at {host}:{port}")

    def leave(self) -> None:
        """Leave the group, on both sides; the next sync makes another. A server that can't is
        named on stderr and not waited for."""
        if self._group is None:
            return
        servers, self._joined = self._joined, []
        # all at once, see outer_group.leave
        leaving = {
            _begin(partial(server.leave_group, self._name)): server.url for server in servers
        }
        leaving[_begin(self._leave)] = _SENDER
        seconds = min(LEAVE_SECONDS, self.timeout)
        done, late = wait(leaving, seconds)
        failed = {leaving[f]: _in_words(e) for f in done if (e := f.exception())}
        failed |= {leaving[future]: f"no answer within {seconds:.0f} s" for future in late}
        for who, what in failed.items():
            words = f"{who} did not leave {self._name}, whose memory it may hold until it ends: "
            print(words + what, file=sys.stderr, flush=True)

    def _leave(self) -> None:
        # the only reference, and none where a server kept the group from being made
        group, self._group = self._group, None
        if group is not None and group.exception() is None:
            outer_group.leave(group.result())

    def _finish(self, doing: Mapping[Future[Any], str], what: str) -> dict[str, str]:
        """Wait until all have done it, or one failed; what went wrong, by who failed or else is
        late."""
        done, late = wait(doing, self.timeout, FIRST_EXCEPTION)
        failed = {doing[f]: _in_words(e) for f in done if (e := f.exception())}
        if not failed:
            advice = (
                f"no answer within {self.timeout:.0f} s; look into the server's log, and whether "
                f"it reaches {self.host} (rollout.interface)"
            )
            failed = {doing[future]: advice for future in late}
        return {who: f"{who} has not {what}: {words}" for who, words in failed.items()}

    def sync(self, servers: Mapping[int, Server], version: int) -> dict[str, float]:
        """See WeightSync."""
        phase, sends = _Phases(), dist.get_rank() == 0
        mine = servers if sends else {}
        with phase("pause"):
            faults = _each(mine, lambda server: server.pause())
            able = [server for engine, server in mine.items() if engine not in faults]
            failed = self._join(able)
        buffers = [self.plan.buffer() if sends else None for _ in range(2)]
        finish: Callable[[], dict[str, str]] = dict
        for index, bucket in enumerate(self.plan.buckets):
            with phase("gather"):
                tensors = self.plan.fill(bucket, buffers[index % 2])
                self.backend.synchronize()
            if not able or failed:
                continue
            with phase("load"):
                failed = finish()
                last = index + 1 == len(self.plan.buckets)
                if not failed:
                    finish = self._send(tensors, version if last else None)
        with phase("load"):
            failed = failed or finish()
            # ranks may be anywhere in it
            if failed:
                self.leave()
        with phase("resume"):
            # one that did not fail has all weights, and tells so, or its earlier version
            faults |= {e: failed[s.url] for e, s in mine.items() if s.url in failed}
            _resume(mine, version, faults, failed.get(_SENDER, ""))
        return phase.result()

    def _send(
        self, tensors: Sequence[tuple[str, Tensor]], version: int | None
    ) -> Callable[[], dict[str, str]]:
        """Begin to send a bucket; what waits until the servers have loaded it, see _finish."""
        assert self._group is not None
        group = self._group.result()
        sending = _begin(lambda: [outer_group.broadcast(tensor, group) for _, tensor in tensors])
        doing: dict[Future[Any], str] = {sending: _SENDER}
        named = [(fused_experts.sent_name(name), tensor) for name, tensor in tensors]
        for server in self._joined:
            load = partial(server.load_broadcast, named, self._name, version)
            doing[_begin(load)] = server.url
        mib = sum(tensor.nbytes for _, tensor in tensors) / 2**20

        def finish() -> dict[str, str]:
            failed = self._finish(doing, f"loaded {len(tensors)} tensors of {mib:.1f} MiB")
            if failed:
                return failed
            # the broadcasts are over, but torch keeps their tensors until it is asked
            words = _try(lambda: [work.wait() for work in sending.result()])
            return {_SENDER: words} if words else {}

        return finish


class DiskSync:
    """Engines that share nothing with the trainers but a file system."""

    def __init__(
        self,
        model: Qwen3VLModel,
        config_from: Path,
        folder: Path,
        quantization: Quantization | None = None,
    ) -> None:
        """config_from: Hugging Face directory whose config and processor go with the weights;
        folder: where they are written, on the file system that the engines see."""
        self.config_from, self.folder = config_from, folder
        self.plan = WeightPlan(model, receivers=[0], quantization=quantization)

    def sync(self, servers: Mapping[int, Server], version: int) -> dict[str, float]:
        """See WeightSync."""
        phase = _Phases()
        leads = dist.get_rank() == 0
        mine = servers if leads else {}
        path = self.folder / f"version_{version}"
        with phase("write"):
            hf_writer.write(path, self.plan.weights(), self.plan.nbytes, self.config_from)
        with phase("load"):
            faults = _each(mine, partial(_load_disk, hf_dir=path, version=version))
        if leads:
            shutil.rmtree(path)
        _resume(mine, version, faults)
        return phase.result()


class StoredSync:
    """Engines that read the weights of a Hugging Face directory, which nobody trains."""

    def __init__(self, hf_dir: Path) -> None:
        """hf_dir: on a file system that the engines see."""
        self.hf_dir = hf_dir

    def sync(self, servers: Mapping[int, Server], version: int) -> dict[str, float]:
        """See WeightSync; engines that have the version read nothing."""
        phase = _Phases()
        mine = servers if dist.get_rank() == 0 else {}

        def load(server: Server) -> None:
            if server.version() != version:
                _load_disk(server, self.hf_dir, version)

        with phase("load"):
            faults = _each(mine, load)
        # those that read nothing, too, so that none stays paused
        _resume(mine, version, faults)
        return phase.result()


def _load_disk(server: Server, hf_dir: Path, version: int) -> None:
    server.pause()
    server.load_disk(hf_dir, version)


def _each(servers: Mapping[int, Server], action: Callable[[Server], None]) -> dict[int, str]:
    """Do it with all servers at once; what went wrong, by engine."""
    with ThreadPoolExecutor(max(1, len(servers))) as pool:
        words = pool.map(lambda server: _try(partial(action, server)), servers.values())
        return {e: fault for e, fault in zip(servers, words, strict=True) if fault}


def _begin[T](action: Callable[[], T]) -> Future[T]:
    """Do it in a thread that nothing waits for, not even the process when it ends."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(action())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def _in_words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _try(action: Callable[[], Any]) -> str:
    """What went wrong, or nothing."""
    try:
        action()
    except Exception as error:
        return _in_words(error)
    return ""


def _resume(
    servers: Mapping[int, Server], version: int, faults: Mapping[int, str], error: str = ""
) -> None:
    """Let this rank's servers sample again, with the new version; SyncFailed on every rank if
    anything went wrong on any.

    faults: what this rank saw go wrong with an engine, whether it talks to the server or not;
    error: what went wrong with none in particular.
    """
    # SGLang answers for its first rank alone: what failed on another one only that one's trainer
    # knows, while the server has the new version already
    broken = _gather(faults)
    able = {engine: server for engine, server in servers.items() if engine not in broken}
    paused = _each(able, lambda server: server.resume())
    broken |= _gather(paused)
    awake = {engine: server for engine, server in able.items() if engine not in paused}
    words = [*_each(awake, partial(_check, version=version)).values(), error]
    others: list[list[str]] = [[]] * dist.get_world_size()
    dist.all_gather_object(others, words)
    found = [f"engine {engine}, {words}" for engine, words in broken.items()]
    found += [f"rank {r}: {text}" for r, texts in enumerate(others) for text in texts if text]
    if found:
        raise SyncFailed("the weights did not get to the engines: " + "; ".join(found), broken)


def _gather(faults: Mapping[int, str]) -> dict[int, str]:
    """What any rank saw go wrong, by engine; on every rank."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, dict(faults))
    words: dict[int, list[str]] = {}
    for rank, seen in enumerate(found):
        for engine, fault in seen.items():
            words.setdefault(engine, []).append(f"rank {rank}: {fault}")
    return {engine: "; ".join(faults) for engine, faults in words.items()}


def _check(server: Server, version: int) -> None:
    _check_version(server.version(), version, server.url)


def _check_version(found: int, version: int, engine: str) -> None:
    if found != version:
        raise RuntimeError(
            f"weights of version {version} were sent, but {engine} answers with version {found}; "
            "stopping, since its rollouts would be credited to the wrong weights"
        )


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])
