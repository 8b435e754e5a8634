"""Gloo ranks that are spawned once and run many checks.

A check is a module-level function; it runs on every rank inside an initialised world and may
return something picklable. A rank that raises sends its traceback, and the test fails with it; a
rank that hangs is killed with the others after the timeout.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import itertools
import os
import signal
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch.multiprocessing as mp


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


CHECKS_BETWEEN_SWEEPS = 3
# imported once, by the process that ranks are forked from
PRELOADED = [
    "transformers.models.qwen3_vl.modeling_qwen3_vl",
    "transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe",
    "prism_megatron.pipelines.alignment",
    "prism_megatron.pipelines.rlvr",
    "checkpoint_tools.megatron_to_hf",
    "tests.dist.checks",
]


def _serve(rank: int, world: int, port: int, pipe: Connection, sweeps: bool) -> None:
    # with a process group of its own a rank dies together with its children
    os.setsid()
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_RANK=str(rank),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )
    import torch

    from model_providers import backend

    torch.set_num_threads(1)
    # what has been imported stays; looking through it after every check would take a second
    gc.freeze()
    backend.create("cpu").init_process_group(timeout_seconds=400)
    for served in itertools.count(1):
        try:
            check, args = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(("ok", check(*args)))
        except BaseException:
            pipe.send(("error", traceback.format_exc()))
        gc.collect()
        if sweeps and served % CHECKS_BETWEEN_SWEEPS == 0:
            _destroy_groups()


def _destroy_groups() -> None:
    """Every gloo group has threads that wake up a hundred times a second: a thousand of them leave
    the cores no time for anything else."""
    import torch
    import torch.distributed as dist
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher

    from tests.dist import checks

    checks.parallel_state.cache_clear()
    # hooks of megatron.core's DDP hang on nodes of autograd, where the garbage collector does not
    # look, and hold it with all its groups; so do the last routing probabilities of the experts
    for found in gc.get_objects():
        if isinstance(found, DistributedDataParallel):
            found.grad_accs.clear()
        elif isinstance(found, MoETokenDispatcher):
            kept = {k: v for k, v in vars(found).items() if not isinstance(v, torch.Tensor)}
            vars(found).clear()
            vars(found).update(kept)
    gc.collect()
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
    gc.collect()


class Ranks:
    """A world of gloo ranks on this machine."""

    def __init__(self, world: int, *, sweeps: bool = True) -> None:
        """sweeps: destroy the groups that checks leave behind; none may be used by a later one."""
        self.world, self.sweeps = world, sweeps
        self._start()
        atexit.register(self.close)

    def _start(self) -> None:
        context, port = mp.get_context("forkserver"), _free_port()
        context.set_forkserver_preload(PRELOADED)
        self.pipes, self.processes = [], []
        for rank in range(self.world):
            here, there = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, self.world, port, there, self.sweeps), daemon=True
            )
            process.start()
            self.pipes.append(here)
            self.processes.append(process)

    def run(self, check: Callable[..., Any], *args: Any, timeout: float = 480) -> list[Any]:
        """Run check(*args) on every rank; the results by rank, or the first failure's traceback."""
        for pipe in self.pipes:
            pipe.send((check, args))
        results: dict[int, Any] = {}
        while len(results) < self.world:
            waiting = [p for rank, p in enumerate(self.pipes) if rank not in results]
            ready = wait(waiting, timeout)
            if not ready:
                self.restart()
                late = sorted(set(range(self.world)) - set(results))
                raise TimeoutError(f"ranks {late} gave no answer within {timeout} s")
            for pipe in ready:
                rank = self.pipes.index(pipe)
                try:
                    status, value = pipe.recv()
                except (EOFError, ConnectionResetError):
                    status, value = "error", "the process died"
                if status == "error":
                    # the others may wait in a collective for this rank
                    self.restart()
                    raise AssertionError(f"rank {rank} of {self.world} failed:\n{value}")
                results[rank] = value
        return [results[rank] for rank in range(self.world)]

    def restart(self) -> None:
        """Other processes in the place of these."""
        self.close()
        self._start()

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.join()
