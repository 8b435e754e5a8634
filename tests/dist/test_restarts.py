"""Engines on GPUs of their own that end and are started again: what the group that weights come by
leaves behind, and what becomes of a sync that one of them does not live to see the end of."""

from __future__ import annotations

import contextlib
import gc
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file
from torch.distributed import distributed_c10d

from model_providers.parallel import Layout
from model_providers.qwen3_vl import Qwen3VLModel
from prism_megatron.config import schema
from prism_megatron.rollout.refit import ServerRefit
from prism_megatron.rollout.router import Lease
from prism_megatron.rollout.server import Endpoint
from prism_megatron.rollout.weight_sync import BroadcastSync, SyncFailed
from tests.dist.ranks import Ranks
from tests.dist.test_weight_sync import _model
from tests.mock_sglang import KEY, MockSGLang, serve
from tests.unit.test_local_engine import save, tiny_model

PAUSE = "/pause_generation"
JOIN, LOAD = "/init_weights_update_group", "/update_weights_from_distributed"

# of the trainer's process
_weights: Qwen3VLModel
_refit: ServerRefit
_own = 0
"""Its groups without one of engines."""


class Troubled(MockSGLang):
    """Ends, or hangs, when it is asked for a path."""

    def __init__(self, hf_dir: Path, path: str, hangs: bool) -> None:
        super().__init__(hf_dir)
        self.path, self.hangs = path, hangs

    def answer(self, path: str, body: Any) -> Any:
        if path == self.path:
            if not self.hangs:
                os._exit(1)
            time.sleep(1000)
        return super().answer(path, body)


class Served:
    """A server in a process of its own."""

    def __init__(self, hf_dir: Path, path: str = "", hangs: bool = False) -> None:
        context = mp.get_context("forkserver")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(
            target=_serve, args=(hf_dir, path, hangs, theirs), daemon=True
        )
        self.process.start()
        theirs.close()
        self.port: int = self.pipe.recv()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    def look(self, factor: int) -> Any:
        """Tensors that are not the directory's times a factor, the version, what is held, and
        whether it waits."""
        self.pipe.send(factor)
        return self.pipe.recv()


def _serve(hf_dir: Path, path: str, hangs: bool, pipe: Any) -> None:
    torch.set_num_threads(1)
    mock, weights = Troubled(hf_dir, path, hangs), load_file(hf_dir / "model.safetensors")
    with serve(mock) as url:
        pipe.send(int(url.rpartition(":")[2]))
        with contextlib.suppress(EOFError):
            while True:
                _look(mock, weights, pipe)


def _look(mock: MockSGLang, weights: dict[str, torch.Tensor], pipe: Any) -> None:
    factor, got = pipe.recv(), mock.loaded
    same = {n for n, t in got.items() if n in weights and t.equal(weights[n] * factor)}
    pipe.send((sorted(set(weights) ^ same), mock.version, _held(), mock.paused))


def _held() -> tuple[int, int]:
    """Groups that torch knows of in this process, and open files, sockets among them."""
    gc.collect()
    world = distributed_c10d._world
    known: list[Any] = [world.pg_map, world.pg_names, world.pg_group_ranks, world.pg_to_tag]
    [groups] = {len(groups) for groups in known}
    return groups - _own, psutil.Process().num_fds()


@pytest.fixture(scope="module")
def hf_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny_model(), tmp_path_factory.mktemp("served"))


@pytest.fixture
def trainer(hf_dir: Path) -> Iterator[Ranks]:
    """One rank, which keeps its groups from one call to the next."""
    world = Ranks(1, sweeps=False)
    world.run(_open, hf_dir)
    yield world
    world.close()


def _open(hf_dir: Path) -> None:
    global _refit, _weights, _own
    # as torchrun has it for ranks, which are not to look for engines in its store
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    _weights = _model(hf_dir, Layout())
    rollout = schema.Rollout(kind="sglang", engines=2, gpus=(5, 6))
    _refit = ServerRefit(rollout, _weights, hf_dir)
    _own = _held()[0]


def _sync(ports: list[int], version: int) -> tuple[int, int]:
    """Double the weights and send them; what is held then."""
    with torch.no_grad():
        for parameter in _weights.parameters():
            parameter.mul_(2)
    leases = [Lease(i, version, 0, Endpoint("127.0.0.1", p, KEY)) for i, p in enumerate(ports)]
    _refit(leases, version)
    return _held()


def _leave() -> tuple[int, int]:
    assert isinstance(_refit._sync, BroadcastSync)
    _refit._sync.leave()
    return _held()


def test_restarts_leave_nothing_behind(trainer: Ranks, hf_dir: Path) -> None:
    servers = [Served(hf_dir)]
    trainer.run(_sync, [servers[0].port], 1)
    # an engine that was not there when the others were placed
    servers.append(Served(hf_dir))
    held = []
    for version in range(2, 6):
        held += trainer.run(_sync, [server.port for server in servers], version)
        found = [server.look(2**version) for server in servers]
        assert [(wrong, got) for wrong, got, *_ in found] == [([], version)] * 2
        held.append(found[0][2])
        servers[1].kill()
        servers[1] = Served(hf_dir)
    # of the trainer and of the server that lives on
    assert [groups for groups, _ in held] == [1] * 8
    assert held[2:] == held[:2] * 3
    assert trainer.run(_leave)[0][0] == servers[0].look(1)[2][0] == 0


def _fail(ports: list[int], seconds: float, group_goes: bool = True) -> tuple[str, list[int]]:
    """What a sync with so much time says, once its group is gone, and the engines it broke."""
    _refit._sync = sync = BroadcastSync(_weights, 1, bucket_bytes=2**15, timeout_seconds=seconds)
    _refit._placed = set(range(len(ports)))
    clients = {i: _refit._client(Endpoint("127.0.0.1", port, KEY)) for i, port in enumerate(ports)}
    with pytest.raises(SyncFailed) as caught:
        sync.sync(clients, 7)
    while group_goes and (_held()[0] or sync._group is not None):
        time.sleep(0.1)
    # enough for the next one
    sync.timeout = 60
    return str(caught.value), sorted(caught.value.broken)


@pytest.mark.parametrize("hangs", [False, True], ids=["ends", "hangs"])
@pytest.mark.parametrize("path, what", [(JOIN, "joined the group of 3 ranks"), (LOAD, "loaded ")])
def test_a_server_that_fails_in_a_sync_is_named_and_the_next_sync_goes_on(
    trainer: Ranks, hf_dir: Path, path: str, what: str, hangs: bool
) -> None:
    servers = [Served(hf_dir), Served(hf_dir, path, hangs)]
    [(error, broken)] = trainer.run(
        _fail, [s.port for s in servers], 5 if hangs else 20, timeout=60
    )
    # where one hangs the other may be late, too
    assert broken == [1] or (hangs and broken == [0, 1])
    assert servers[0].look(1)[3] == (0 in broken)
    assert f"http://127.0.0.1:{servers[1].port}" in error
    assert f" has not {what}" in error
    assert ("within 5 s; look into the server's log" in error) == hangs
    servers[1].kill()
    servers[1] = Served(hf_dir)
    trainer.run(_sync, [server.port for server in servers], 1)
    assert [server.look(2)[:2] for server in servers] == [([], 1)] * 2


def test_a_server_that_can_not_pause_is_left_out(trainer: Ranks, hf_dir: Path) -> None:
    servers = [Served(hf_dir), Served(hf_dir, PAUSE)]
    [(_, broken)] = trainer.run(_fail, [s.port for s in servers], 20, False, timeout=60)
    assert broken == [1]
    wrong, version, _, waits = servers[0].look(1)
    assert (wrong, version, waits) == ([], 7, False)
