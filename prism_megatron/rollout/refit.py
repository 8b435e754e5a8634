"""Which servers a fleet starts, and which way the policy's weights take into them.

engine's GPUs are trainers' too    IpcSync
engine has GPUs of its own         BroadcastSync
rollout.sync_folder is given       DiskSync
nobody trains the policy           StoredSync
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from model_providers.qwen3_vl import Qwen3VLModel
from prism_megatron.config import schema
from prism_megatron.rollout import sglang, vllm
from prism_megatron.rollout.http_engine import HttpEngine
from prism_megatron.rollout.router import Lease
from prism_megatron.rollout.server import Endpoint, ServerKind, address_of
from prism_megatron.rollout.vocabulary import Vocabulary
from prism_megatron.rollout.weight_sync import (
    BroadcastSync,
    DiskSync,
    IpcSync,
    StoredSync,
    WeightSync,
)

_PROGRAMS: dict[str, tuple[Callable[..., Any], type[HttpEngine]]] = {
    "sglang": (sglang.server_command, sglang.SGLangEngine),
    "vllm": (vllm.server_command, vllm.VLLMEngine),
}


def server_kind(config: schema.Rollout, hf_dir: Path, routes: bool) -> ServerKind:
    """The configured engine program, for the model of a Hugging Face directory.

    routes: its rollouts come with the experts that tokens took.
    """
    command, _ = _PROGRAMS[config.kind]
    return ServerKind(
        partial(_command, command, config, hf_dir, routes),
        partial(connect, config.kind, hf_dir, routes=routes),
    )


def _command(
    command: Callable[..., Any],
    config: schema.Rollout,
    hf_dir: Path,
    routes: bool,
    endpoint: Endpoint,
) -> tuple[list[str], dict[str, str]]:
    found: tuple[list[str], dict[str, str]] = command(
        hf_dir,
        host=endpoint.host,
        port=endpoint.port,
        api_key=endpoint.api_key,
        tensor=config.tensor,
        python=str(config.python or sys.executable),
        routes=routes,
        options=config.server_args,
    )
    return found


def connect(kind: str, hf_dir: Path, endpoint: Endpoint, *, routes: bool = False) -> Any:
    """The client of a server that listens at the endpoint."""
    vocabulary = _vocabulary(hf_dir)
    return _PROGRAMS[kind][1](endpoint.url, endpoint.api_key, vocabulary, routes=routes)


@cache
def _vocabulary(hf_dir: Path) -> Vocabulary:
    return Vocabulary.of(hf_dir)


class ServerRefit:
    """Refit of servers; see ray_fleet.Refit."""

    def __init__(self, config: schema.Rollout, model: Qwen3VLModel | None, hf_dir: Path) -> None:
        self.config, self.model, self.hf_dir = config, model, hf_dir
        self._sync: WeightSync | None = None
        self._placed: set[int] = set()
        self._clients: dict[Endpoint, Any] = {}

    def __call__(self, leases: Sequence[Lease], version: int) -> dict[str, float]:
        """Seconds by phase; SyncFailed, on every rank, if an engine did not get the weights."""
        # an engine that was down when the others were placed has its place to be found, too
        if self._sync is None or not self._placed >= {lease.engine for lease in leases}:
            if isinstance(self._sync, BroadcastSync):
                self._sync.leave()
            self._sync = self._way(leases)
            self._placed = {lease.engine for lease in leases}
        servers = {lease.engine: self._client(lease.address) for lease in leases}
        return self._sync.sync(servers, version)

    def _client(self, endpoint: Endpoint) -> Any:
        # a restarted server may get the same port, and has another key
        if endpoint not in self._clients:
            self._clients[endpoint] = connect(self.config.kind, self.hf_dir, endpoint)
        return self._clients[endpoint]

    def _way(self, leases: Sequence[Lease]) -> WeightSync:
        config = self.config
        if self.model is None:
            return StoredSync(self.hf_dir)
        if config.sync_folder is not None:
            return DiskSync(self.model, self.hf_dir, config.sync_folder, config.quantization)
        places: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(places, (address_of(config.interface), _own_gpu()))
        ranks = engine_ranks({lease.engine: lease.address.host for lease in leases}, config, places)
        if all(ranks.values()):
            return IpcSync(self.model, ranks, quantization=config.quantization)
        if config.sleep:
            raise ValueError(
                "rollout.sleep lends the engines' GPU memory to trainers, but none of them runs on "
                f"rollout.gpus={list(config.gpus)}; leave it out, or give engines trainers' GPUs"
            )
        return BroadcastSync(
            self.model,
            config.tensor,
            host=address_of(config.interface),
            quantization=config.quantization,
        )


def engine_ranks(
    hosts: Mapping[int, str], config: schema.Rollout, places: Sequence[tuple[str, int]]
) -> dict[int, list[int]]:
    """For each engine the trainer ranks that have its GPUs; none where the GPUs are its own.

    hosts: of each engine; places: host and GPU of each rank. ValueError if trainers have some of
    the engines' GPUs and not others.
    """
    rank_at = {place: rank for rank, place in enumerate(places)}
    ranks: dict[int, list[int]] = {}
    for engine, host in hosts.items():
        first = engine % config.engines_per_node * config.tensor
        gpus = config.gpus[first : first + config.tensor]
        ranks[engine] = [rank_at[host, gpu] for gpu in gpus if (host, gpu) in rank_at]
    shared = sum(map(len, ranks.values()))
    if shared not in (0, config.tensor * len(hosts)):
        raise ValueError(
            f"trainers have {shared} of the {config.tensor * len(hosts)} GPUs of the engines; "
            "choose rollout.gpus so that engines share all of theirs with trainers, or none"
        )
    return ranks


def _own_gpu() -> int:
    """Number of this rank's GPU on its host."""
    local = int(os.environ.get("LOCAL_RANK", "0"))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    try:
        return int(visible.split(",")[local]) if visible else local
    except (ValueError, IndexError) as error:
        raise ValueError(
            f"CUDA_VISIBLE_DEVICES={visible!r} has no number for local rank {local}; list the "
            "trainers' GPUs by number, so that engines on the same ones are known"
        ) from error
