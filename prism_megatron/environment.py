"""What can be wrong with a host, or between hosts, before a model is built.

 this host:       versions, settings, memory, disk, GPUs        --> Finding "bad" or "note"
 between hosts:   clocks, whether a folder is the same for all  --> numbers, by collectives

A stage refuses to start on what is bad (check_host, check_shared); `prism-megatron doctor` prints
all of it.
"""

from __future__ import annotations

import math
import os
import socket
import time
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
import torch.distributed as dist
from packaging.version import Version

GIB = 2**30
CLUSTER_TIMEOUT = timedelta(seconds=180)
"""Of the collectives here: hosts that are up answer at once, but may read a folder late."""
VISIBLE_SECONDS = 30
"""That a file may take to be seen from another host; NFS keeps what it knows of a folder."""
CLOCK_SKEW = 2.0
"""Seconds between clocks from which on files and logs of two hosts contradict each other."""
CHECKED_PACKAGES = ("torch", "transformers", "transformer-engine", "kernels", "apex")


BLOCKS = 1.04
"""Host memory that offloaded state takes, over its bytes (model_providers/host_memory.py)."""
PROCESS = 8e9
"""An allowance for what a rank takes of host memory besides: packages, CUDA's and NCCL's buffers,
batches."""


@dataclass(frozen=True)
class Finding:
    """Something about a host; bad: a run would fail or compute something else."""

    severity: Literal["bad", "note"]
    what: str


@dataclass(frozen=True)
class Room:
    """What is free on a host, in bytes; shm: /dev/shm, free and in all; disk: where runs go."""

    memory: int
    shm: int
    shm_total: int
    disk: int


def bad(what: str) -> Finding:
    return Finding("bad", what)


def note(what: str) -> Finding:
    return Finding("note", what)


def known_bad(versions: Mapping[str, Version], apex_files: Collection[str]) -> Iterator[str]:
    """Versions that are known not to work together, each with its way out.

    versions: installed packages; apex_files: files of the installed distribution called apex.
    """

    def has(name: str, lowest: str, below: str = "9999") -> bool:
        return name in versions and Version(lowest) <= versions[name] < Version(below)

    if has("transformer-engine", "2.13") and has("torch", "2.11", "2.12"):
        yield (
            f"Transformer Engine {versions['transformer-engine']} needs a newer cuBLAS than torch "
            "2.11 brings and raises OSError at import; install transformer-engine 2.12.0"
        )
    if has("kernels", "0.17") and has("transformers", "5.6", "5.7"):
        yield f"kernels {versions['kernels']} breaks transformers 5.6; install kernels 0.14.1"
    if has("transformers", "0", "5"):
        yield (
            f"transformers {versions['transformers']} reads a checkpoint written by 5.x with "
            "rope_theta ten times off and without a warning; install transformers 5.6.0, and keep "
            "an engine that needs 4.x in an environment of its own"
        )
    if "apex" in versions and not any(file.startswith("apex/optimizers/") for file in apex_files):
        yield (
            "the installed package apex is not NVIDIA Apex, which is built from its source only; "
            "uninstall it"
        )


def installed(name: str) -> str | None:
    """Version of a distribution, None if there is none."""
    try:
        return distribution(name).version
    except PackageNotFoundError:
        return None


def distribution_files(name: str) -> list[str]:
    """Files of an installed distribution; none if it isn't installed or doesn't record them."""
    try:
        return [str(file) for file in distribution(name).files or ()]
    except PackageNotFoundError:
        return []


def settings(
    variables: Mapping[str, str],
    interfaces: Mapping[str, Sequence[str]],
    own_address: str | None,
    hosts: int,
) -> Iterator[Finding]:
    """What environment variables ask of NCCL, Gloo and torch.

    interfaces: name -> IPv4 addresses; own_address: what this host's name resolves to, if anything.
    """
    for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        yield from _interface(name, variables.get(name, ""), interfaces, hosts)
    if hosts > 1:
        yield from _choice(variables, interfaces, own_address)

    def on(name: str) -> bool:
        return variables.get(name, "0") not in ("", "0")

    for off, wanted in (
        ("NCCL_IB_DISABLE", "NCCL_IB_HCA"),
        ("NCCL_P2P_DISABLE", "NCCL_P2P_LEVEL"),
    ):
        if on(off) and variables.get(wanted):
            yield bad(f"{off}=1 contradicts {wanted}={variables[wanted]}; unset one of them")
    if on("NCCL_IB_DISABLE") and variables.get("NCCL_NET", "").upper() == "IB":
        yield bad("NCCL_IB_DISABLE=1 contradicts NCCL_NET=IB; unset one of them")
    channels = [variables.get(f"NCCL_{end}_NCHANNELS", "") for end in ("MIN", "MAX")]
    if all(map(str.isdigit, channels)) and int(channels[0]) > int(channels[1]):
        yield bad(
            f"NCCL_MIN_NCHANNELS={channels[0]} is above NCCL_MAX_NCHANNELS={channels[1]}; unset "
            "them"
        )
    for name in ("TORCH_NCCL_ASYNC_ERROR_HANDLING", "NCCL_ASYNC_ERROR_HANDLING"):
        if variables.get(name) == "0":
            yield bad(f"{name}=0 has ranks wait forever for one that died; unset it")
    timeout = variables.get("NCCL_IB_TIMEOUT", "")
    if timeout.isdigit() and int(timeout) > 31:
        yield note(
            f"NCCL_IB_TIMEOUT={timeout} does not fit InfiniBand's five bits (0 to 31, exponent of "
            "4 us): what comes of it is up to the driver; 22 is 17 s"
        )
    for name, cost in (
        ("NCCL_P2P_DISABLE", "GPUs of a host do not use NVLink"),
        ("NCCL_SHM_DISABLE", "GPUs of a host without NVLink use the network"),
        ("CUDA_LAUNCH_BLOCKING", "the host waits for every kernel"),
    ):
        if on(name):
            yield note(f"{name}={variables[name]}: {cost}")


def _interface(
    name: str, value: str, interfaces: Mapping[str, Sequence[str]], hosts: int
) -> Iterator[Finding]:
    """A variable that names interfaces: NCCL takes prefixes, =exact and ^excluded names."""
    if not value or value.startswith("^"):
        return
    exact = name.startswith("GLOO") or value.startswith("=")
    asked = value.removeprefix("=").split(",")
    found = [i for i in interfaces for a in asked if (i == a if exact else i.startswith(a))]
    if not found:
        yield bad(
            f"{name}={value} names no interface of {socket.gethostname()}, which has "
            f"{', '.join(sorted(interfaces))}"
        )
    elif hosts > 1 and all(a.startswith("127.") for i in found for a in interfaces[i]):
        yield bad(f"{name}={value} is an interface that no other host reaches; name another")


def _choice(
    variables: Mapping[str, str],
    interfaces: Mapping[str, Sequence[str]],
    own_address: str | None,
) -> Iterator[Finding]:
    """What Gloo and NCCL take between hosts where nobody says which interface."""
    if not variables.get("GLOO_SOCKET_IFNAME") and (own_address or "127.").startswith("127."):
        yield bad(
            f"Gloo listens where the host's name leads, and {socket.gethostname()} is "
            f"{own_address or 'not known'} here, which no other host reaches; set "
            "GLOO_SOCKET_IFNAME (or the launcher's INTERFACE)"
        )
    reachable = {
        name: addresses
        for name, addresses in interfaces.items()
        if any(not address.startswith("127.") for address in addresses)
    }
    unset = [
        name for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if not variables.get(name)
    ]
    if len(reachable) > 1 and unset:
        listed = ", ".join(f"{name} {' '.join(a)}" for name, a in sorted(reachable.items()))
        yield note(f"{' and '.join(unset)} not set, and there is a choice: {listed}")


def room_for(folder: Path) -> Room:
    """What is free on this host, and where `folder` is or would be."""
    shm = psutil.disk_usage("/dev/shm")
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return Room(free_memory(), shm.free, shm.total, psutil.disk_usage(str(folder)).free)


def free_memory() -> int:
    """Bytes of host memory that this process may still take."""
    return int(min(psutil.virtual_memory().available, _container_memory()))


def _container_memory(cgroup: Path = Path("/sys/fs/cgroup")) -> float:
    """What a container's limit leaves; files in the page cache make room by themselves."""
    limit = cgroup / "memory.max"
    if not limit.is_file() or limit.read_text().strip() == "max":
        return math.inf
    lines = (line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    stat = {name: int(value) for name, value in lines}
    used = int((cgroup / "memory.current").read_text()) - stat["file"] + stat["shmem"]
    return int(limit.read_text()) - used


def space(room: Room, devices: int) -> Iterator[Finding]:
    """Too little of something; devices: GPUs of the host."""
    if room.memory < GIB:
        yield bad(f"{room.memory / GIB:.2f} GiB of host memory are free; stop what has it")
    elif devices and room.memory < 16 * GIB * devices:
        yield note(
            f"{room.memory / GIB:.0f} GiB of host memory are free for {devices} GPUs; loading and "
            "saving take some 16 GiB a GPU for large models"
        )
    if devices > 1 and room.shm_total < GIB:
        yield bad(
            f"/dev/shm has {room.shm_total / GIB:.2f} GiB, too little for NCCL, Ray and data "
            "workers; start the container with --shm-size=16g or --ipc=host"
        )
    elif room.shm < GIB // 4:
        yield note(f"{room.shm / GIB:.2f} GiB are free in /dev/shm, which Ray and data workers use")
    if room.disk < GIB:
        yield bad(f"{room.disk / GIB:.2f} GiB are free on the disk for run.dir; make room")
    elif devices and room.disk < 200 * GIB:
        yield note(
            f"{room.disk / GIB:.0f} GiB are free on the disk for run.dir; a checkpoint with "
            "optimizer takes 14 bytes a parameter"
        )


def gpus(free: Mapping[int, tuple[int, int]]) -> Iterator[Finding]:
    """free: GPU -> free and all of its bytes."""
    for number, (left, total) in free.items():
        words = f"GPU {number} has {left / GIB:.1f} of {total / GIB:.1f} GiB free"
        if left < total // 4:
            yield bad(f"{words}; another process has the rest (nvidia-smi)")
        elif left < total * 9 // 10:
            yield note(words)


def ports(first: int, count: int, named: bool) -> Iterator[Finding]:
    """Ports that are taken, of those that a job's first node needs; named: the user chose them."""
    taken = []
    for port in range(first, first + count):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except OSError:
                taken.append(str(port))
    if taken:
        words = f"ports {', '.join(taken)} are in use; a job that starts here needs a MASTER_PORT"
        yield (bad if named else note)(f"{words} of its own, which now is {first}")


def addresses() -> dict[str, list[str]]:
    """Interface -> IPv4 addresses, of the interfaces that are up."""
    up = {name for name, stats in psutil.net_if_stats().items() if stats.isup}
    return {
        name: [a.address for a in found if a.family is socket.AF_INET]
        for name, found in psutil.net_if_addrs().items()
        if name in up
    }


def own_address() -> str | None:
    """What this host's name resolves to."""
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return None


def hosts() -> int:
    """Hosts of the world that a launcher started, if all have as many ranks as this one; a world
    that meets over loopback is on one."""
    if os.environ.get("MASTER_ADDR", "").startswith(("127.", "localhost")):
        return 1
    world = int(os.environ.get("WORLD_SIZE", "1"))
    return max(1, world // int(os.environ.get("LOCAL_WORLD_SIZE", str(world))))


def check_host(run_dir: Path, device: torch.device) -> None:
    """ValueError with all that is bad about this rank's GPU and, once a host, about the host;
    before any collective."""
    findings: list[Finding] = []
    on_gpus = device.type != "cpu"
    if os.environ.get("LOCAL_RANK", "0") == "0":
        devices = torch.accelerator.device_count() if on_gpus else 0
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if 0 < devices < ranks:
            findings.append(bad(f"{ranks} ranks for {devices} GPUs; lower NPROC_PER_NODE"))
        found = {name: installed(name) for name in CHECKED_PACKAGES}
        versions = {name: Version(version) for name, version in found.items() if version}
        findings += map(bad, known_bad(versions, distribution_files("apex")))
        findings += settings(os.environ, addresses(), own_address(), hosts())
        findings += space(room_for(run_dir), devices)
    if on_gpus and (device.index or 0) < torch.accelerator.device_count():
        findings += gpus({device.index or 0: torch.accelerator.get_memory_info(device)})
    if words := [finding.what for finding in findings if finding.severity == "bad"]:
        listed = "\n".join(f"- {word}" for word in words)
        raise ValueError(f"{socket.gethostname()} is not fit for a run:\n{listed}")


def check_host_memory(state: float) -> None:
    """ValueError if this host has no room for so many bytes of optimizer state of each of its
    ranks: Linux would kill them in the middle of the start, without a word."""
    ranks, free = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), free_memory()
    wanted = ranks * (BLOCKS * state + PROCESS)
    if wanted > free:
        raise ValueError(
            f"{socket.gethostname()} has {free / 1e9:.1f} GB of memory free, and its {ranks} "
            f"rank(s) want {wanted / 1e9:.1f} GB: {state / 1e9:.1f} GB of optimizer state each, "
            f"which offload=true keeps there, {BLOCKS - 1:.0%} more for the blocks it lies in, and "
            f"{PROCESS / 1e9:.0f} GB for the process; spread the run over more GPUs, set "
            "moments=bfloat16, or leave offload out"
        )


def check_shared(run_dir: Path) -> None:
    """ValueError, on all ranks, if run_dir is not the same folder on all hosts."""
    if hosts() == 1:
        return
    group = dist.new_group(backend="gloo", timeout=CLUSTER_TIMEOUT)
    apart = hosts_apart(run_dir, group)
    dist.destroy_process_group(group)
    if apart:
        raise ValueError(
            f"run.dir={run_dir} is another folder on {', '.join(apart)} than on the first host; "
            "checkpoints need one that all hosts share"
        )


def hosts_apart(folder: Path, group: dist.ProcessGroup) -> list[str]:
    """Names of the hosts that do not see what the first rank writes into `folder`, on all ranks."""
    first = dist.get_rank() == 0
    told = [f".shared-{uuid.uuid4().hex}", ""]
    if first:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / told[0]).touch()
        except OSError as error:
            told[1] = f"{folder} can't be written on {socket.gethostname()}: {error}"
    dist.broadcast_object_list(told, group=group)
    name, trouble = told
    if trouble:
        raise ValueError(trouble)
    deadline = time.monotonic() + VISIBLE_SECONDS
    while not (seen := (folder / name).exists()) and time.monotonic() < deadline:
        time.sleep(0.2)
    reports: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(reports, (socket.gethostname(), seen), group=group)
    if first:
        (folder / name).unlink()
    return list(dict.fromkeys(host for host, seen in reports if not seen))


def clock_offsets(group: dist.ProcessGroup, rounds: int = 5) -> list[float]:
    """Seconds that each rank's clock is ahead of the first one's, with the smallest delay seen."""
    best = [float("inf")] * dist.get_world_size()
    for _ in range(rounds):
        dist.barrier(group)
        clocks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(clocks, time.time(), group=group)
        offsets = [clock - clocks[0] for clock in clocks]
        best = [min(b, o, key=abs) for b, o in zip(best, offsets, strict=True)]
    return best
