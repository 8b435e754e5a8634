"""An engine that is a server process: its command line, start, watch and end.

Server.start: free port, random API key --> guard --> command --> log file
              asked for its health until it answers --> Endpoint
"""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from prism_megatron.rollout.engine import EngineDied, Part, ServerClient

LOG_LINES, LOG_BYTES = 30, 2**15
POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Endpoint:
    """Where a server listens, and the key that its requests need."""

    host: str
    port: int
    api_key: str = field(repr=False)

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"


@dataclass(frozen=True)
class ServerKind:
    """One engine program: command line and additional environment for an endpoint, and a client."""

    command: Callable[[Endpoint], tuple[list[str], dict[str, str]]]
    connect: Callable[[Endpoint], ServerClient]


class Server:
    """One server process, which ends when this process does."""

    def __init__(
        self,
        kind: ServerKind,
        *,
        log: Path,
        gpus: tuple[int, ...] = (),
        interface: str | None = None,
        health_timeout: float,
    ) -> None:
        """log: file that gets the server's output; gpus: ids of this node, all that it may see;
        interface: network interface it listens on, loopback if None; health_timeout: seconds that
        one question for its health may take."""
        self.kind, self.log, self.gpus, self.interface = kind, log, gpus, interface
        self.health_timeout = health_timeout
        self._process: subprocess.Popen[bytes] | None = None
        self._client: ServerClient | None = None

    async def start(self, timeout: float) -> Endpoint:
        """Start the process; returns when it answers.

        EngineDied if it ends instead, TimeoutError if it does not answer within `timeout` seconds;
        either with the last lines of its log.
        """
        host = address_of(self.interface)
        endpoint = Endpoint(host, _free_port(host), secrets.token_hex(24))
        self.log.parent.mkdir(parents=True, exist_ok=True)
        # -P: what lies beside the guard must not be found in place of the standard library
        guard = [sys.executable, "-P", str(Path(__file__).with_name("guard.py"))]
        command, additional = self.kind.command(endpoint)
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [*guard, *command],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=outside_of_ranks() | additional | visible(self.gpus),
            )
        self._client = self.kind.connect(endpoint)
        deadline = time.monotonic() + timeout
        while True:
            try:
                await self.health()
                return endpoint
            except EngineDied:
                raise
            except Exception as error:
                if time.monotonic() > deadline:
                    raise TimeoutError(
                        f"no answer within {timeout:.0f} s ({type(error).__name__}: {error}); "
                        f"{self.last_words()}"
                    ) from error
                await asyncio.sleep(POLL_SECONDS)

    async def alive(self) -> None:
        """EngineDied, with its last words, if the server has ended; without asking it."""
        assert self._process is not None, "start comes first"
        if (status := self._process.poll()) is not None:
            raise EngineDied(f"the server ended with status {status}; {self.last_words()}")

    async def health(self) -> None:
        """Returns if the server answers; EngineDied, with its last words, if it has ended."""
        await self.alive()
        assert self._client is not None, "start comes first"
        async with asyncio.timeout(self.health_timeout):
            await self._client.health()

    async def weight_version(self) -> int:
        """See EngineClient."""
        assert self._client is not None, "start comes first"
        return await self._client.weight_version()

    async def sleep(self) -> None:
        """See ServerClient."""
        assert self._client is not None, "start comes first"
        await self._client.sleep()

    async def wake(self, part: Part) -> None:
        """See ServerClient."""
        assert self._client is not None, "start comes first"
        await self._client.wake(part)

    def last_words(self) -> str:
        """The end of the server's log, for an error message."""
        end = b""
        if self.log.exists():
            with self.log.open("rb") as log:
                # of weeks
                log.seek(max(0, os.fstat(log.fileno()).st_size - LOG_BYTES))
                end = log.read()
        lines = end.decode(errors="replace").splitlines()
        if not lines:
            return f"it wrote nothing to {self.log}"
        return "\n".join([f"the last lines of {self.log}:", *lines[-LOG_LINES:]])

    async def stop(self) -> None:
        """End the process with all its children; returns when they are gone."""
        if self._client is not None:
            await self._client.close()
        if self._process is not None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            await asyncio.to_thread(self._process.wait)


def address_of(interface: str | None) -> str:
    """IPv4 address of a network interface of this machine; loopback if None.

    ValueError with the interfaces that there are, if it has none.
    """
    if interface is None:
        return "127.0.0.1"
    found: dict[str, str] = {
        name: address.address
        for name, addresses in psutil.net_if_addrs().items()
        for address in addresses
        if address.family is socket.AF_INET
    }
    if interface not in found:
        raise ValueError(
            f"rollout.interface: {socket.gethostname()} has no IPv4 interface {interface!r}; "
            f"it has {', '.join(sorted(found))}"
        )
    return found[interface]


_OF_RANKS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_NCCL = {"NCCL_CUMEM_ENABLE": "1", "NCCL_NVLS_ENABLE": "2"}
"""NCCL's own defaults, which the trainer has. Unless they are named, SGLang 0.5.12 sets both to 0
(entrypoints/engine.py), older vLLM the first, and NCCL wants the ranks of a group to agree on them:
a trainer and its engines are one in a weight sync."""


def outside_of_ranks() -> dict[str, str]:
    """This process's environment without what torchrun and srun tell a rank of the trainer, and
    with what the trainer's ranks and a server's have to have in common.

    Ray's processes inherit it. A server would look for torchrun's store instead of making its own
    (torch.distributed.rendezvous, TORCHELASTIC_USE_AGENT_STORE), and its allocator would get the
    trainer's settings, with which memory can't be given back.
    """
    prefixes = ("TORCHELASTIC_", "LOCAL_", "GROUP_", "ROLE_", "SLURM_", "PYTORCH_CUDA_ALLOC_CONF")
    return _NCCL | {
        name: value
        for name, value in os.environ.items()
        if name not in _OF_RANKS and not name.startswith((*prefixes, "PYTORCH_ALLOC_CONF"))
    }


def visible(gpus: tuple[int, ...]) -> dict[str, str]:
    """What makes these GPUs, if any are named, the only ones that a process sees."""
    return {"CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus))} if gpus else {}


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
