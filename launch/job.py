"""What a job is: its variables, checked, and the commands that each of its nodes runs.

node 0                 trainers, Ray's head; the other nodes do what it says
1 .. trainer nodes     trainers, Ray
the last ENGINE_NODES  Ray only, with the resource that draws rollout engines there
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

from prism_megatron import cli

RANKS = Path(__file__).with_name("ranks.py")
PORTS = 3
"""From MASTER_PORT on: torchrun's store, node 0's door, Ray's head."""
ENGINE_RESOURCE = "engine_node"


@dataclass(frozen=True)
class Command:
    """An argument vector, and what it has in its environment besides the node's own."""

    argv: tuple[str, ...]
    environment: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        words = [f"{name}={shlex.quote(value)}" for name, value in self.environment]
        return " ".join([*words, *map(shlex.quote, self.argv)])


@dataclass(frozen=True)
class Job:
    """The same on every node, but for `node` and `interface`.

    resource: Ray resource of the nodes that engines go to, None where any will do; ray: whether a
    fleet over several nodes is to be brought up.
    """

    arguments: tuple[str, ...]
    nodes: int = 1
    node: int = 0
    engine_nodes: int = 0
    ranks: str = "gpu"
    address: str = "localhost"
    port: int = 29500
    run_id: str = "prism-megatron"
    interface: str | None = None
    max_restarts: int = 0
    join_seconds: float = 600
    save_seconds: float = 600
    ray: bool = False
    resource: str | None = None

    @property
    def trainers(self) -> int:
        """Nodes with ranks; they are the first ones."""
        return self.nodes - self.engine_nodes

    @property
    def ray_folder(self) -> Path:
        """Short, since sockets below it have names of up to 107 bytes, and this job's alone."""
        name = f"{self.run_id} {self.port} {self.node}"
        return Path("/tmp", f"prism-ray-{sha256(name.encode()).hexdigest()[:10]}")

    def start_ray(self, own: str, head: str) -> Command:
        """own, head: addresses of this node and of node 0."""
        port = str(self.port + 2)
        place = ["--head", "--port", port, "--include-dashboard", "false"]
        if self.node:
            place = ["--address", f"{head}:{port}"]
        has_engines = self.node >= self.trainers or not self.engine_nodes
        if self.resource and has_engines:
            place += ["--resources", json.dumps({self.resource: 1})]
        place += ["--node-ip-address", own, "--temp-dir", str(self.ray_folder)]
        # of 30 s, a busy host or a cold file system needs more
        patience = ("RAY_raylet_start_wait_time_s", "180")
        return Command(("ray", "start", *place), (("RAY_USAGE_STATS_ENABLED", "0"), patience))

    def start_ranks(self, head: str) -> Command:
        """torchrun on this node; head: address of node 0."""
        # by its name a host may not find itself
        where = ["--standalone", "--local-addr", "127.0.0.1"]
        if self.trainers > 1:
            where = ["--nnodes", str(self.trainers), "--node-rank", str(self.node)]
            where += ["--master-addr", self.address, "--master-port", str(self.port)]
        environment = {}
        if self.interface:
            environment = dict.fromkeys(
                ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), self.interface
            )
        if self.ray:
            environment["RAY_ADDRESS"] = f"{head}:{self.port + 2}"
        torchrun = ["python", str(RANKS), *where, "--nproc-per-node", self.ranks]
        argv = (*torchrun, "-m", "prism_megatron", *self.arguments)
        return Command(argv, tuple(environment.items()))

    def describe(self) -> list[str]:
        """What this node would run, as shell lines."""
        own, head = (f"ADDRESS_OF_NODE_{node}" for node in (self.node, 0))
        role = "trainer" if self.node < self.trainers else "engines"
        lines = [f"# node {self.node} of {self.nodes}: {role}"]
        if self.ray:
            lines.append(str(self.start_ray(own, head)))
        if self.node < self.trainers:
            lines.append(str(self.start_ranks(head)))
        return lines


def from_environment(environment: Mapping[str, str], arguments: Sequence[str]) -> Job:
    """The job that the variables and the stage's configuration describe.

    ValueError with everything that is wrong with the variables, or with the configuration.
    """
    wrong: list[str] = []

    def number(name: str, default: int, lowest: int, highest: int = 2**31) -> int:
        given = environment.get(name) or str(default)
        if given.isascii() and given.isdigit() and lowest <= int(given) <= highest:
            return int(given)
        upper = "" if highest == 2**31 else f" to {highest}"
        wrong.append(f"{name}={given!r} is not a number from {lowest}{upper}")
        return default

    nodes = number("NNODES", 1, 1)
    engine_nodes = number("ENGINE_NODES", 0, 0, nodes - 1)
    node = 0
    if nodes > 1:
        # srun's own word for it
        environment = {"NODE_RANK": environment.get("SLURM_NODEID", "")} | dict(environment)
        node = number("NODE_RANK", 0, 0, nodes - 1)
        wrong += [
            f"{name} is missing, which {nodes} nodes (NNODES) need: {meaning}"
            for name, meaning in (
                ("NODE_RANK", "the number of this node, 0 on the first"),
                ("MASTER_ADDR", "the first node, as the others reach it"),
            )
            if not environment.get(name)
        ]
    ranks = environment.get("NPROC_PER_NODE") or "gpu"
    if ranks != "gpu":
        ranks = str(number("NPROC_PER_NODE", 1, 1))
    job = Job(
        arguments=tuple(arguments),
        nodes=nodes,
        node=node,
        engine_nodes=engine_nodes,
        ranks=ranks,
        address=environment.get("MASTER_ADDR") or "localhost",
        port=number("MASTER_PORT", 29500, 1024, 65536 - PORTS),
        run_id=environment.get("RUN_ID") or "prism-megatron",
        interface=environment.get("INTERFACE") or None,
        max_restarts=number("MAX_RESTARTS", 0, 0),
        join_seconds=number("JOIN_SECONDS", 600, 1),
        save_seconds=number("SAVE_SECONDS", 600, 1),
    )
    if wrong:
        raise ValueError("\n".join(wrong))
    return _with_stage(job, "RAY_ADDRESS" in environment)


def _with_stage(job: Job, has_ray: bool) -> Job:
    """The job as its stage needs it; has_ray: whether RAY_ADDRESS names a running cluster."""
    if not job.arguments:
        raise ValueError("no stage given; `--help` lists them")
    stage, *rest = job.arguments
    if stage == "doctor":
        # every node is asked, once
        return replace(job, engine_nodes=0, ranks="1")
    rollout = None
    if stage not in ("checkpoint", *cli.TOOLS):
        rollout = getattr(cli.parse(stage, rest)[1], "rollout", None)
    if rollout is None or rollout.kind == "embedded":
        if job.engine_nodes:
            raise ValueError(
                f"ENGINE_NODES={job.engine_nodes}, but {stage} has no engines of their own here; "
                "set rollout.kind, or leave ENGINE_NODES out"
            )
        return job
    if job.nodes > 1 and rollout.kind != "local" and rollout.interface is None:
        if job.interface is None:
            raise ValueError(
                f"{rollout.kind} servers listen on loopback, which ranks of other nodes do not "
                "reach; set INTERFACE, or rollout.interface where servers have one of their own"
            )
        job = replace(job, arguments=(*job.arguments, f"rollout.interface={job.interface}"))
    if not job.engine_nodes:
        if not has_ray and rollout.nodes > job.nodes:
            raise ValueError(f"rollout.nodes={rollout.nodes}, but the job has {job.nodes} (NNODES)")
        resource = rollout.node_resource
        return replace(job, ray=job.nodes > 1 and not has_ray, resource=resource)
    if has_ray:
        raise ValueError(
            f"ENGINE_NODES={job.engine_nodes} are for a Ray cluster of this job, but RAY_ADDRESS "
            "names a running one; leave one of them out"
        )
    if rollout.nodes != job.engine_nodes:
        raise ValueError(
            f"rollout.nodes={rollout.nodes}, but ENGINE_NODES={job.engine_nodes}; make them equal"
        )
    resource = rollout.node_resource or ENGINE_RESOURCE
    arguments = job.arguments
    if rollout.node_resource is None:
        arguments += (f"rollout.node_resource={resource}",)
    return replace(job, ray=True, resource=resource, arguments=arguments)
