"""Node 0's part of a job: brings the nodes together, and decides for all of them.

nodes: join --> Ray on node 0, then on the others --> ranks --> ended --> stop --> exit STATUS
                  ^_______ stop, if a rank died and restarts are left ___|
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import sys
import time
from collections.abc import Collection
from typing import Any

from job import Job

USAGE, SAVED = 2, 75
"""Exit statuses that no restart mends: a mistake of the user, and a checkpoint on request."""
BYE_SECONDS = 30
"""That a node may take to end what it started."""
SIGNALS = {
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGUSR1: signal.SIGUSR1,
    signal.SIGINT: signal.SIGTERM,
    signal.SIGHUP: signal.SIGTERM,
}
"""What a launcher is sent, and what ranks get of it: both have a stage save and end."""


class Ended(Exception):
    """The job, or this attempt at it, is over."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


class Link:
    """Messages, each a line of JSON, between a node and node 0."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        connection = writer.get_extra_info("socket")
        if connection.family != socket.AF_UNIX:
            # a host that is cut off is noticed within half a minute
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in (
                (socket.TCP_KEEPIDLE, 10),
                (socket.TCP_KEEPINTVL, 5),
                (socket.TCP_KEEPCNT, 4),
                (socket.TCP_USER_TIMEOUT, 30_000),
            ):
                connection.setsockopt(socket.IPPROTO_TCP, option, value)

    @property
    def own_address(self) -> str:
        return str(self._writer.get_extra_info("sockname")[0])

    def send(self, *message: Any) -> None:
        with contextlib.suppress(OSError):
            self._writer.write(json.dumps(message).encode() + b"\n")

    async def receive(self) -> list[Any] | None:
        """The next message; None when the other end is gone."""
        try:
            line = await self._reader.readline()
            return list(json.loads(line)) if line.endswith(b"\n") else None
        except (OSError, TypeError, ValueError):
            return None

    def close(self) -> None:
        self._writer.close()


class Head:
    """On node 0: brings the nodes together and decides for all of them."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self._links: dict[int, Link] = {}
        self._addresses: dict[int, str] = {}
        self._events: asyncio.Queue[tuple[int, list[Any]]] = asyncio.Queue()
        self._gone: set[int] = set()
        self._signal: signal.Signals | None = None
        self._interrupts = 0

    async def admit(self, link: Link, own: str | None = None) -> None:
        """Let a node join, and hear it until it is gone; own: its address where that is known."""
        message = await link.receive()
        match message:
            case ["join", int(node), str(address), [*what]]:
                pass
            case _:
                link.close()
                return
        mine = identity(self.job)
        if what != mine:
            link.send("refused", f"node {node} was started with {what}, node 0 with {mine}")
            return
        if node in self._links:
            link.send("refused", f"there is a node {node} already (NODE_RANK)")
            return
        self._links[node], self._addresses[node] = link, own or address
        self._events.put_nowait((node, ["joined"]))
        while (message := await link.receive()) is not None:
            self._events.put_nowait((node, message))
        self._events.put_nowait((node, ["gone"]))

    async def run(self) -> int:
        """The whole job; its exit status, which every node that is left ends with, too."""
        status = 1
        try:
            await self._all("joined", range(self.job.nodes), self.job.join_seconds)
            status = await self._attempts()
        except Ended as ended:
            say(str(ended))
            status = ended.status
        finally:
            await self._stop()
            self._tell(self._links, "exit", status)
        return status

    async def _attempts(self) -> int:
        for attempt in range(self.job.max_restarts + 1):
            if attempt:
                await self._stop()
                say(f"starting again, {attempt} of {self.job.max_restarts} times (MAX_RESTARTS)")
            try:
                await self._attempt()
                return 0
            except Ended as ended:
                final = ended.status in (USAGE, SAVED) or self._signal or self._gone
                if final or attempt == self.job.max_restarts:
                    raise
                say(str(ended))
        raise AssertionError("the last attempt returns or raises")

    async def _attempt(self) -> None:
        """Ended when a rank fails or anything else does."""
        head = self._addresses[0]
        if self.job.ray:
            others = range(1, self.job.nodes)
            for nodes in ([0], others):
                for node in nodes:
                    self._tell([node], "ray", self._addresses[node], head)
                await self._all("ready", nodes, self.job.join_seconds)
        trainers = range(self.job.trainers)
        self._tell(trainers, "ranks", head)
        await self._all("done", trainers, None)

    async def _all(self, what: str, nodes: Collection[int], seconds: float | None) -> None:
        """Wait until each of these nodes says `what`; Ended if something comes in between."""
        waiting = set(nodes)
        saved = False
        deadline = time.monotonic() + seconds if seconds is not None else None
        while waiting:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            try:
                node, message = await asyncio.wait_for(self._events.get(), left)
            except TimeoutError:
                raise self._late(what, waiting, saved) from None
            match message:
                case ["ended", 0, str()] if what == "done" and node in waiting:
                    waiting.discard(node)
                case ["ended", int(status), str()] if status == SAVED and node in waiting:
                    saved = True
                    waiting.discard(node)
                    # the other nodes' ranks are about to end alike
                    deadline = deadline or time.monotonic() + self.job.save_seconds
                case ["ended", int(), str(why)] if saved:
                    say(f"node {node}: {why}")
                    waiting.discard(node)
                case ["ended", int(status), str(why)]:
                    raise Ended(status or 1, f"node {node}: {why}")
                case ["signalled", int(number)]:
                    deadline = self._signalled(node, number, what) or deadline
                case ["gone"]:
                    self._gone.add(node)
                    raise Ended(1, f"node {node} is gone")
                case [str(said)] if said == what:
                    waiting.discard(node)
        if saved:
            raise Ended(SAVED, "the stage saved and ended, as it was asked to")

    def _late(self, what: str, waiting: Collection[int], saved: bool) -> Ended:
        nodes = f"nodes {sorted(waiting)}"
        if saved:
            return Ended(SAVED, f"the stage saved; the ranks of {nodes} did not end by themselves")
        if self._signal is not None:
            seconds = f"{self.job.save_seconds:.0f} s after {self._signal.name} (SAVE_SECONDS)"
            return Ended(128 + self._signal, f"{nodes} still had ranks {seconds}")
        return Ended(1, f"{nodes} not {what} within {self.job.join_seconds:.0f} s (JOIN_SECONDS)")

    def _signalled(self, node: int, number: int, what: str) -> float | None:
        """Pass the first signal on to all ranks, which then have until what is returned; Ctrl-C
        twice does not wait for them."""
        first, self._interrupts = self._signal is None, self._interrupts + (number == signal.SIGINT)
        name = signal.Signals(number).name
        if what != "done" or self._interrupts > 1:
            raise Ended(128 + number, f"node {node} got {name}; ending")
        if not first:
            return None
        self._signal = signal.Signals(number)
        say(f"node {node} got {name}; the ranks have {self.job.save_seconds:.0f} s for saving")
        self._tell(range(self.job.trainers), "signal", SIGNALS[self._signal])
        return time.monotonic() + self.job.save_seconds

    async def _stop(self) -> None:
        """Have all nodes end what they started; one that does not answer is given up."""
        self._tell(self._links, "stop")
        waiting = set(self._links) - self._gone
        deadline = time.monotonic() + BYE_SECONDS
        while waiting:
            left = max(0.0, deadline - time.monotonic())
            try:
                node, message = await asyncio.wait_for(self._events.get(), left)
            except TimeoutError:
                say(f"nodes {sorted(waiting)} did not say that they stopped")
                return
            if message == ["gone"]:
                self._gone.add(node)
            if message[0] in ("gone", "stopped"):
                waiting.discard(node)
            if message[0] == "signalled":
                self._signal = signal.Signals(message[1])

    def _tell(self, nodes: Collection[int], *message: Any) -> None:
        for node in nodes:
            if node in self._links:
                self._links[node].send(*message)


def identity(job: Job) -> list[Any]:
    """What all nodes of a job have in common."""
    return [job.run_id, job.nodes, job.engine_nodes, *job.arguments]


def say(what: str) -> None:
    print(f"launch: {what}", file=sys.stderr, flush=True)
