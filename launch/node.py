"""What every node of a job runs; torchrun.sh, slurm.sbatch and mlp.sh set its variables.

    node.py [--dry-run] STAGE --config FILE [section.field=value ...]

 launcher --> guard --> node --> ranks.py --> ranks          on trainers
              (outlives  |  `--> ray start --> engines       where the stage has any
               the node) |
                         `===TCP==> node 0: all there? --> Ray --> ranks --> how did they end?
                                    `--> signals, restarts, the end: the same on every node

The exit status is that of the rank that failed first, on every node; 75 says that the stage saved
because it was asked to end. Whatever a node started ends before it does. `--dry-run` prints what
would run on which node.

  NNODES           nodes (default 1), of which the last
  ENGINE_NODES     have rollout engines and no ranks (default 0)
  NODE_RANK        number of this node, 0 on the first (default: SLURM_NODEID); two nodes and more
                   need it, as they do
  MASTER_ADDR      the first node, as the others reach it
  MASTER_PORT      first of three ports of it (default 29500)
  NPROC_PER_NODE   ranks of a node (default: one a GPU)
  RUN_ID           name that all nodes give the run (default prism-megatron)
  INTERFACE        network interface of this node for Gloo, NCCL's bootstrap and Ray (default:
                   theirs, and for Ray the one towards MASTER_ADDR)
  MAX_RESTARTS     times that all ranks are started again when one dies (default 0); the stage goes
                   on from its last checkpoint
  JOIN_SECONDS     that nodes wait for each other (default 600)
  SAVE_SECONDS     that ranks have for saving after a signal (default 600)
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Coroutine, Sequence
from dataclasses import replace
from typing import Any

import psutil
from head import BYE_SECONDS, SIGNALS, USAGE, Head, Link, identity, say
from job import Command, Job, from_environment

STOP_SECONDS = 5
"""From the request to end (SIGTERM) to the end (SIGKILL)."""
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


class Node:
    """Starts and ends processes here, as node 0 says."""

    def __init__(self, job: Job, link: Link) -> None:
        self.job, self.link = job, link
        self._started: set[int] = set()
        self._ray: set[int] = set()
        self._torchrun: int | None = None
        self._waiting: list[asyncio.Task[None]] = []

    async def run(self) -> int:
        """Until node 0 says which status to end with, or is gone."""
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.add_signal_handler(number, self.link.send, "signalled", number)
        watch = asyncio.create_task(self._watch_ray())
        try:
            while (message := await self.link.receive()) is not None:
                match message:
                    case ["ray", str(own), str(head)]:
                        self._do(self._start_ray(own, head))
                    case ["ranks", str(head)]:
                        self._do(self._run_ranks(head))
                    case ["signal", int(sent)]:
                        self._do(self._pass_on(signal.Signals(sent)))
                    case ["stop"]:
                        await self._stop()
                        self.link.send("stopped")
                    case ["exit", int(status)]:
                        return status
                    case ["refused", str(why)]:
                        raise ValueError(why)
                    case _:
                        raise AssertionError(f"unknown message {message}")
            say(f"node {self.job.node}: node 0 is gone; ending")
            return 1
        finally:
            watch.cancel()
            # the launcher may ask once more while we end
            for number in SIGNALS:
                loop.remove_signal_handler(number)
                signal.signal(number, signal.SIG_IGN)
            await self._stop()

    def _do(self, work: Coroutine[Any, Any, None]) -> None:
        async def done() -> None:
            try:
                await work
            except OSError as error:
                self.link.send("ended", 1, str(error))

        self._waiting.append(asyncio.create_task(done()))

    async def _start(self, command: Command) -> asyncio.subprocess.Process:
        say(f"node {self.job.node}: {command}")
        process = await asyncio.create_subprocess_exec(
            *command.argv,
            stdin=subprocess.DEVNULL,
            env=os.environ | dict(command.environment),
            start_new_session=True,
        )
        self._started.add(process.pid)
        return process

    async def _start_ray(self, own: str, head: str) -> None:
        shutil.rmtree(self.job.ray_folder, ignore_errors=True)
        before = {child.pid for child in self._alive(recursive=False)}
        status = await (await self._start(self.job.start_ray(own, head))).wait()
        if status:
            self.link.send("ended", status, "ray start failed")
            return
        # its daemons are ours now: this process is who orphans are left to
        children = [child for child in self._alive(recursive=False) if child.pid not in before]
        with contextlib.suppress(psutil.NoSuchProcess):
            self._ray = {c.pid for c in children if c.name() in ("raylet", "gcs_server")}
        self.link.send("ready")

    async def _run_ranks(self, head: str) -> None:
        process = await self._start(self.job.start_ranks(head))
        self._torchrun = process.pid
        status = await process.wait()
        self._torchrun = None
        status = status if status >= 0 else 128 - status
        self.link.send("ended", status, f"ranks ended with status {status}")

    async def _pass_on(self, number: signal.Signals) -> None:
        """To the ranks themselves, once they are there: torchrun would give them 30 s to end."""
        while self._torchrun is not None:
            with contextlib.suppress(psutil.NoSuchProcess):
                if ranks := psutil.Process(self._torchrun).children():
                    for rank in ranks:
                        _signal(rank, number)
                    return
            await asyncio.sleep(0.1)

    async def _watch_ray(self) -> None:
        while True:
            await asyncio.sleep(1)
            alive = {child.pid for child in self._alive(recursive=False)}
            if self._ray - alive:
                self._ray.clear()
                self.link.send("ended", 1, f"Ray ended; see {self.job.ray_folder}")

    async def _stop(self) -> None:
        """End everything that runs here."""
        self._ray.clear()
        deadline = time.monotonic() + STOP_SECONDS
        for child in self._alive():
            _signal(child, signal.SIGTERM)
        while alive := self._alive():
            if time.monotonic() > deadline:
                for child in alive:
                    _signal(child, signal.SIGKILL)
            await asyncio.sleep(0.05)
        # what their end was is nobody's concern any more
        for task in self._waiting:
            task.cancel()
        self._waiting.clear()

    def _alive(self, recursive: bool = True) -> list[psutil.Process]:
        return descendants(recursive, self._started)


async def run_node(job: Job) -> int:
    """This node's part of the job; its exit status."""
    if job.node == 0:
        return await _run_first(job)
    link = await _reach_first(job)
    link.send("join", job.node, address_of(job.interface) or link.own_address, identity(job))
    node = Node(job, link)
    return await node.run()


async def _run_first(job: Job) -> int:
    here, there = socket.socketpair()
    head = Head(job)
    own = address_of(job.interface) or "127.0.0.1"
    door = None
    if job.nodes > 1:
        own = address_of(job.interface) or _resolve(job.address)
        door = await _open_door(job, head)
    link = Link(*await asyncio.open_connection(sock=here))
    inside = Link(*await asyncio.open_connection(sock=there))
    link.send("join", 0, own, identity(job))
    admitting = asyncio.create_task(head.admit(inside))
    deciding = asyncio.create_task(head.run())
    status = await Node(job, link).run()
    with contextlib.suppress(TimeoutError):
        status = await asyncio.wait_for(deciding, BYE_SECONDS)
    # the others have got their "exit" when they hang up
    link.close()
    await admitting
    if door is not None:
        door.close()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(door.wait_closed(), STOP_SECONDS)
    return status


async def _open_door(job: Job, head: Head) -> asyncio.Server:
    async def admit(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await head.admit(Link(reader, writer))
        writer.close()

    try:
        return await asyncio.start_server(admit, "", job.port + 1)
    except OSError as error:
        raise ValueError(
            f"port {job.port + 1} of node 0 can't be used ({error.strerror}); jobs on one host "
            f"need a MASTER_PORT each, which now is {job.port}"
        ) from error


async def _reach_first(job: Job) -> Link:
    deadline = time.monotonic() + job.join_seconds
    while True:
        try:
            async with asyncio.timeout(10):
                return Link(*await asyncio.open_connection(job.address, job.port + 1))
        except (OSError, TimeoutError) as error:
            if time.monotonic() > deadline:
                raise ValueError(
                    f"node {job.node} did not reach node 0 at {job.address}:{job.port + 1} within "
                    f"{job.join_seconds:.0f} s (JOIN_SECONDS): {error or type(error).__name__}; is "
                    "it up, and are MASTER_ADDR and MASTER_PORT the same on all nodes?"
                ) from error
            await asyncio.sleep(0.5)


def _resolve(host: str) -> str:
    """IPv4 address of node 0, as the other nodes reach it; ValueError if only itself does."""
    try:
        address = socket.gethostbyname(host)
    except OSError as error:
        raise ValueError(f"MASTER_ADDR={host} does not resolve here: {error}") from error
    if address.startswith("127."):
        raise ValueError(
            f"MASTER_ADDR={host} is {address} on node 0, which no other node reaches; give its "
            "address in the network, or set INTERFACE"
        )
    return address


def address_of(interface: str | None) -> str | None:
    """IPv4 address of an interface of this node; None if none is given."""
    if interface is None:
        return None
    for name, addresses in (found := psutil.net_if_addrs()).items():
        for address in addresses:
            if name == interface and address.family is socket.AF_INET:
                return str(address.address)
    raise ValueError(
        f"INTERFACE={interface}: {socket.gethostname()} has no interface of this name with an IPv4 "
        f"address; it has {', '.join(sorted(found))}"
    )


def descendants(recursive: bool = True, own: Collection[int] = ()) -> list[psutil.Process]:
    """Processes below this one that run; ended ones that were left to it are reaped, but for `own`,
    which somebody waits for."""
    alive = []
    for child in psutil.Process().children(recursive):
        with contextlib.suppress(psutil.NoSuchProcess):
            if child.status() != psutil.STATUS_ZOMBIE:
                alive.append(child)
            elif child.pid not in own and child.ppid() == os.getpid():
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(child.pid, os.WNOHANG)
    return alive


def _signal(process: psutil.Process, number: signal.Signals) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(number)


def guarded(work: Callable[[], int]) -> int:
    """work() in a process of its own; whatever it leaves behind, if it was killed for example, ends
    with it. Its exit status."""
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    guard = os.getpid()
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    child = os.fork()
    if child == 0:
        # Ctrl-C in a terminal comes to the guard alone, which passes it on
        os.setpgid(0, 0)
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        prctl(PR_SET_CHILD_SUBREAPER, 1)
        sys.exit(work() if os.getppid() == guard else 1)
    for number in SIGNALS:
        signal.signal(number, lambda got, _: os.kill(child, got))
    _, ended = os.waitpid(child, 0)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    deadline = time.monotonic() + STOP_SECONDS
    for number in (signal.SIGTERM, signal.SIGKILL):
        for left in descendants():
            _signal(left, number)
        while descendants() and (time.monotonic() < deadline or number == signal.SIGKILL):
            time.sleep(0.05)
    status = os.waitstatus_to_exitcode(ended)
    return status if status >= 0 else 128 - status


def main(arguments: Sequence[str]) -> int:
    """See the top of this file."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if arguments else USAGE
    dry_run = arguments[0] == "--dry-run"
    try:
        job = from_environment(os.environ, arguments[dry_run:])
        if not dry_run:
            return guarded(lambda: _run(job))
    except ValueError as error:
        say(str(error))
        return USAGE
    for node in range(job.nodes):
        print(*replace(job, node=node).describe(), sep="\n")
    return 0


def _run(job: Job) -> int:
    try:
        status = asyncio.run(run_node(job))
    except ValueError as error:
        say(str(error))
        return USAGE
    if status == 0:
        shutil.rmtree(job.ray_folder, ignore_errors=True)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
