"""`prism-megatron doctor`: versions, acceleration, settings and room of this host, or of all hosts.

    prism-megatron doctor [--json] [--gpus N] [STAGE --config FILE [section.field=value ...]]
    bash launch/torchrun.sh doctor ...      # on every node: a row each, clocks, the shared folder

With a stage's configuration its GPUs, layouts and run.dir are looked at, too. The exit status is 1
if something is known to be bad. Optional packages are imported in processes of their own, because
some of them break the importing process when they don't fit the host.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import requires
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from rich.console import Console
from rich.table import Table

from prism_megatron import environment
from prism_megatron.config import load as configuration
from prism_megatron.config.schema import Section
from prism_megatron.environment import GIB, Finding, Room, bad, distribution_files, installed

DISTRIBUTION = "prism-megatron"
ACCELERATION = {
    "Transformer Engine": "transformer_engine.pytorch",
    "Apex multi-tensor kernels": "amp_C",
    "Apex fused layer norm": "fused_layer_norm_cuda",
    "FlashAttention": "flash_attn",
    "FlashAttention-3": "flash_attn_3",
    "DeepEP": "deep_ep",
}
"""Optional kernels: the module that loads where they are active."""

ENGINES = ("transformer-engine", "transformer-engine-torch", "sglang", "vllm", "kernels", "apex")
"""Packages outside of our own requirements whose versions matter."""

IMPORT_TIMEOUT_SECONDS = 120


@dataclass(frozen=True)
class Package:
    """An installed package next to the version that it was tested at (None if not pinned)."""

    name: str
    installed: str | None
    tested: str | None

    @property
    def remark(self) -> str:
        if self.installed is None:
            return "missing" if self.tested else ""
        untested = self.tested not in (None, self.installed.partition("+")[0])
        return "not the tested one" if untested else ""


@dataclass(frozen=True)
class Diagnosis:
    """Everything that doctor knows of one host.

    acceleration: name -> "active", "not installed", or the error that importing it raised; clock:
    seconds ahead of the first host; shared: whether run.dir is the first host's.
    """

    host: str
    python: str
    platform: str
    devices: tuple[str, ...]
    packages: tuple[Package, ...]
    acceleration: dict[str, str]
    addresses: dict[str, list[str]]
    room: Room
    findings: tuple[Finding, ...]
    clock: float = 0.0
    shared: bool | None = None

    def of(self, severity: str) -> list[str]:
        return [finding.what for finding in self.findings if finding.severity == severity]


def main(argv: Sequence[str]) -> int:
    """Print the diagnosis; 1 if something known to be bad was found."""
    parser = argparse.ArgumentParser(
        prog="prism-megatron doctor",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--gpus", type=int, metavar="N", help="of the whole job, for the layouts")
    parser.add_argument("--config", action="append", type=Path, metavar="FILE", help="see STAGE")
    parser.add_argument("stage", nargs="?", help="look at what this stage needs, too")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    options = parser.parse_intermixed_args(argv)
    config = None
    if options.stage is not None:
        if options.stage not in configuration.STAGES:
            stages = list(configuration.STAGES)
            raise ValueError(configuration.unknown("stage", options.stage, stages))
        config = configuration.load(options.stage, options.config or [], options.overrides)
    elif options.config:
        parser.error("--config without a STAGE that it is for")
    run = getattr(config, "run", None)
    run_dir: Path | None = run.dir if run is not None else None
    nodes, between = _all_hosts(diagnose(config, run_dir or Path()), run_dir)
    between += _layouts(config, nodes, options.gpus)
    problems = [f"{node.host}: {what}" for node in nodes for what in node.of("bad")] + between
    if dist.is_initialized():
        first = dist.get_rank() == 0
        dist.destroy_process_group()
        if not first:
            return 1 if problems else 0
    if options.json:
        listed = [asdict(node) for node in nodes]
        print(json.dumps({"nodes": listed, "problems": problems}, indent=2, default=str))
    else:
        _print(nodes, problems)
    return 1 if problems else 0


def diagnose(config: Section | None, run_dir: Path) -> Diagnosis:
    """Look at this host and environment; config: of the stage that is to run here, run_dir: where
    it writes."""
    tested = tested_versions()
    names = dict.fromkeys([*_required(), *ENGINES])
    packages = tuple(Package(name, installed(name), tested.get(name)) for name in names)
    acceleration = {name: probe(module) for name, module in ACCELERATION.items()}
    versions = {p.name: Version(p.installed) for p in packages if p.installed}
    interfaces, room = environment.addresses(), environment.room_for(run_dir)
    memory = _gpu_memory()
    findings = [
        *map(bad, environment.known_bad(versions, distribution_files("apex"))),
        *_acceleration(acceleration),
        *environment.settings(
            os.environ, interfaces, environment.own_address(), environment.hosts()
        ),
        *environment.space(room, len(memory)),
        *environment.gpus(memory),
        *_engines(config, len(memory)),
    ]
    # under a launcher this very job has them
    if "RANK" not in os.environ:
        port = int(os.environ.get("MASTER_PORT", "29500"))
        findings += environment.ports(port, 3, named="MASTER_PORT" in os.environ)
    return Diagnosis(
        host=socket.gethostname(),
        python=platform.python_version(),
        platform=platform.platform(),
        devices=tuple(accelerators()),
        packages=packages,
        acceleration=acceleration,
        addresses=interfaces,
        room=room,
        findings=tuple(findings),
    )


def _all_hosts(mine: Diagnosis, run_dir: Path | None) -> tuple[list[Diagnosis], list[str]]:
    """The diagnoses of all hosts, and what is bad between them; under a launcher, which starts one
    rank on each."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return [mine], []
    dist.init_process_group("gloo", timeout=environment.CLUSTER_TIMEOUT)
    group = dist.group.WORLD
    assert group is not None, "it was just made"
    clocks = environment.clock_offsets(group)
    problems = []
    apart: list[str] = []
    if run_dir is not None:
        try:
            apart = environment.hosts_apart(run_dir, group)
        except ValueError as error:
            problems.append(str(error))
    rank = dist.get_rank()
    shared = None if run_dir is None or problems else mine.host not in apart
    nodes: list[Any] = [None] * world
    dist.all_gather_object(nodes, replace(mine, clock=clocks[rank], shared=shared))
    return nodes, problems + list(_between(nodes, run_dir))


def _between(nodes: Sequence[Diagnosis], run_dir: Path | None) -> Iterator[str]:
    """What is bad about hosts that differ."""
    first = nodes[0]
    for node in nodes[1:]:
        if abs(node.clock) > environment.CLOCK_SKEW:
            yield (
                f"the clock of {node.host} is {node.clock:+.1f} s off that of {first.host}; have "
                "both follow one time server"
            )
        if node.shared is False:
            yield (
                f"{node.host} does not see what {first.host} writes into run.dir={run_dir}; "
                "checkpoints need a folder that all hosts share"
            )
        theirs, ours = ({p.name: p.installed for p in n.packages} for n in (node, first))
        if apart := [f"{name} {theirs[name]}" for name in ours if theirs[name] != ours[name]]:
            yield f"{node.host} has other versions than {first.host}: {', '.join(apart)}"


def _layouts(config: Section | None, nodes: Sequence[Diagnosis], gpus: int | None) -> list[str]:
    """Whether the stage's layouts fit the GPUs that there are, or that are named."""
    count = gpus or sum(len(node.devices) for node in nodes)
    if config is None or not count:
        return []
    try:
        configuration.check_layouts(config, count)
    except ValueError as error:
        return [f"layout on {count} GPUs: {error}"]
    return []


def _engines(config: Section | None, devices: int) -> Iterator[Finding]:
    """Whether engines are given GPUs that there are."""
    rollout = getattr(config, "rollout", None)
    if rollout is not None and rollout.gpus and devices and max(rollout.gpus) >= devices:
        yield bad(f"rollout.gpus={list(rollout.gpus)}, but the host has GPUs 0 to {devices - 1}")


def _acceleration(acceleration: Mapping[str, str]) -> Iterator[Finding]:
    """What is installed and does not load, where that breaks more than itself."""
    status = acceleration.get("Transformer Engine", "not installed")
    if status not in ("active", "not installed"):
        yield bad(
            "Transformer Engine is installed but does not load, which breaks the import of "
            f"megatron.core ({status}); repair or uninstall it"
        )


def probe(module: str) -> str:
    """Whether `module` imports in a process of its own: "active", "not installed" or the error."""
    if find_spec(module.partition(".")[0]) is None:
        return "not installed"
    try:
        imported = subprocess.run(
            [sys.executable, "-c", f"import {module}"],
            capture_output=True,
            text=True,
            timeout=IMPORT_TIMEOUT_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return f"import took longer than {IMPORT_TIMEOUT_SECONDS} s"
    if imported.returncode == 0:
        return "active"
    lines = imported.stderr.strip().splitlines()
    return lines[-1] if lines else f"import ended with status {imported.returncode}"


def tested_versions() -> dict[str, str]:
    """Tested version of each package: the checkout's constraints, else the exact requirements."""
    constraints = Path(__file__).resolve().parents[1] / "constraints.txt"
    if constraints.is_file():
        lines = constraints.read_text().splitlines()
    else:
        lines = [line.partition(";")[0] for line in requires(DISTRIBUTION) or ()]
    pins = (re.fullmatch(r"([\w.-]+)==([\w.+!]+)", line.strip()) for line in lines)
    return {canonicalize_name(pin[1]): pin[2] for pin in pins if pin}


def accelerators() -> Iterator[str]:
    """A line a device: in the driver's own words where it has some."""
    if not torch.accelerator.is_available():
        return
    listing = _nvidia_smi("index,name,memory.total,driver_version")
    kind = torch.accelerator.current_accelerator()
    for number in range(torch.accelerator.device_count()):
        yield listing[number] if number < len(listing) else f"{number}, {kind}"


def _gpu_memory() -> dict[int, tuple[int, int]]:
    """GPU -> free and all bytes, as the driver says, without taking any."""
    if not torch.accelerator.is_available():
        return {}
    rows = [row.split(",") for row in _nvidia_smi("index,memory.free,memory.total", "nounits")]
    return {int(index): (int(free) * 2**20, int(total) * 2**20) for index, free, total in rows}


def _nvidia_smi(fields: str, *options: str) -> list[str]:
    """A line a GPU; none where the driver has no such tool."""
    style = ",".join(["csv", "noheader", *options])
    command = ["nvidia-smi", f"--query-gpu={fields}", f"--format={style}"]
    try:
        return subprocess.run(
            command, capture_output=True, text=True, check=True
        ).stdout.splitlines()
    except (FileNotFoundError, subprocess.CalledProcessError):
        return []


def _required() -> list[str]:
    """Names of our own requirements, those of the extras left out."""
    parsed = map(Requirement, requires(DISTRIBUTION) or ())
    return [
        canonicalize_name(requirement.name)
        for requirement in parsed
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    ]


def _print(nodes: Sequence[Diagnosis], problems: Sequence[str]) -> None:
    console = Console()
    first = nodes[0]
    console.print(f"Python {first.python} on {first.platform}")
    console.print("devices: " + ("; ".join(first.devices) or "CPU only"))
    packages = Table("package", "installed", "tested", "")
    for package in first.packages:
        packages.add_row(package.name, package.installed or "-", package.tested, package.remark)
    console.print(packages)
    acceleration = Table("acceleration", "status")
    for name, status in first.acceleration.items():
        acceleration.add_row(name, status)
    console.print(acceleration)
    hosts = Table("host", "GPUs", "addresses", "memory", "/dev/shm", "disk", "clock", "run.dir")
    for node in nodes:
        room = node.room
        hosts.add_row(
            node.host,
            str(len(node.devices)),
            ", ".join(f"{name} {' '.join(a)}" for name, a in node.addresses.items() if a),
            *(f"{free / GIB:.1f} GiB" for free in (room.memory, room.shm, room.disk)),
            f"{node.clock:+.3f} s",
            {None: "-", True: "shared", False: "another"}[node.shared],
        )
    console.print(hosts)
    for node in nodes:
        for what in node.of("note"):
            console.print(f"{node.host}: {what}", style="yellow")
    for problem in problems:
        console.print(f"known bad: {problem}", style="bold red")
    if not problems:
        console.print("nothing known to be bad")
