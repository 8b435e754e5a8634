"""Several hosts on one machine, each a namespace of network, processes and name: torchrun, a Ray
fleet and Slurm over TCP between them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import mock_sglang
from tests.e2e.stages import metrics
from tests.processes import started_by

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "tests" / "fixtures" / "cluster"
HOSTS = 3
NETWORK = "10.83.7"
QUICKSTART = ["--config", "configs/quickstart/smoke.yaml"]


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


def can_make_hosts() -> str:
    """Why hosts can't be made here, or an empty string."""
    if missing := [tool for tool in ("ip", "unshare") if shutil.which(tool) is None]:
        return f"{' and '.join(missing)} missing (Debian: apt install iproute2 util-linux)"
    name = f"probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode:
        return f"no right to make network namespaces: {made.stderr.strip()}"
    run("ip", "netns", "del", name)
    return ""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Environment in which on-host and Slurm's commands find hosts 1 to HOSTS."""
    if reason := can_make_hosts():
        # what checks changes has to be able to
        assert "CI" not in os.environ, reason
        pytest.skip(reason)
    name = f"h{os.getpid()}"
    run("ip", "link", "add", name, "type", "bridge")
    run("ip", "link", "set", name, "up")
    for host in range(1, HOSTS + 1):
        inside, outside = f"{name}-{host}", f"{name}v{host}"
        run("ip", "netns", "add", inside)
        peer = ["peer", "name", "eth0", "netns", inside]
        run("ip", "link", "add", outside, "type", "veth", *peer)
        run("ip", "link", "set", outside, "master", name, "up")
        run("ip", "-n", inside, "addr", "add", f"{NETWORK}.{host}/24", "dev", "eth0")
        run("ip", "-n", inside, "link", "set", "eth0", "up")
        run("ip", "-n", inside, "link", "set", "lo", "up")
    places = [str(CLUSTER), str(Path(sys.executable).parent), os.environ["PATH"]]
    yield os.environ | {
        "CLUSTER": name,
        "CLUSTER_NETWORK": NETWORK,
        "CLUSTER_STATE": str(tmp_path_factory.mktemp("slurm")),
        "PATH": ":".join(places),
        "INTERFACE": "eth0",
        "JOIN_SECONDS": "400",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONWARNINGS": "ignore",
    }
    for host in range(1, HOSTS + 1):
        run("ip", "netns", "del", f"{name}-{host}")
    run("ip", "link", "del", name)


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the quickstart's data and its model, untrained."""
    folder = tmp_path_factory.mktemp("hosts")
    for stage in ("digit-sums", "tiny-model"):
        done = subprocess.run(
            [
                *(sys.executable, "-m", "prism_megatron", stage),
                *("--config", f"configs/quickstart/{stage}.yaml", *QUICKSTART),
                *(f"vars.dir={folder}", "vars.train_rows=48"),
            ],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
    return folder


def arguments(stage: str, folder: Path, *overrides: str) -> list[str]:
    files = ["--config", f"configs/quickstart/{stage}.yaml", *QUICKSTART]
    return [stage, *files, f"vars.dir={folder}", *overrides]


def outputs(processes: list[subprocess.Popen[str]]) -> tuple[list[int], str]:
    said = "\n".join(process.communicate(timeout=600)[0] for process in processes)
    return [process.returncode for process in processes], said


def on_hosts(
    cluster: dict[str, str], count: int, *command: str, **variables: str
) -> list[subprocess.Popen[str]]:
    """torchrun.sh on hosts 1 to count, as a person starts it."""
    job = {"NNODES": str(count), "MASTER_ADDR": f"{NETWORK}.1", "NPROC_PER_NODE": "1"} | variables
    return [
        subprocess.Popen(
            ["on-host", str(node + 1), "bash", "launch/torchrun.sh", *command],
            cwd=ROOT,
            env=cluster | job | {"NODE_RANK": str(node)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node in range(count)
    ]


def wait_for(event: Callable[[], object], launcher: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 400
    while not event():
        assert launcher.poll() is None, launcher.communicate()[0][-6000:]
        assert time.monotonic() < deadline, "not within 400 s"
        time.sleep(0.02)


def checkpoints(folder: Path) -> list[Path]:
    return list(folder.glob("checkpoints/step_*"))


def kill_a_rank(launcher: subprocess.Popen[str], folder: Path) -> None:
    """Kill a rank of this host as soon as there is a checkpoint."""
    wait_for(lambda: checkpoints(folder), launcher)
    rank, *_ = started_by(
        launcher.pid, lambda p: p.cmdline()[1:4] == ["-u", "-m", "prism_megatron"]
    )
    rank.kill()


def on_one_host(cluster: dict[str, str], stage: list[str]) -> None:
    statuses, said = outputs(on_hosts(cluster, 1, *stage))
    assert statuses == [0], said[-6000:]


def submit(cluster: dict[str, str], nodes: int, stage: list[str], **variables: str) -> None:
    """A Slurm job to its end."""
    done = subprocess.run(
        ["sbatch", "--nodes", str(nodes), "launch/slurm.sbatch", *stage],
        cwd=ROOT,
        env=cluster | {"NPROC_PER_NODE": "1"} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=700,
    )
    assert done.returncode == 0, done.stdout[-6000:]


def test_the_pipeline_over_hosts_each_stage_with_what_the_one_before_wrote(
    cluster: dict[str, str], quickstart: Path
) -> None:
    """Models are split over two hosts, a rank of the second dies once; engines are on a third host,
    then beside the ranks."""
    steps = [f"vars.{stage}_steps=2" for stage in ("warmup", "align", "rlvr")]

    def stage(name: str, *overrides: str) -> list[str]:
        return arguments(name, quickstart, *steps, *overrides)

    statuses, said = outputs(on_hosts(cluster, 2, *stage("convert")))
    assert statuses == [0, 0], said[-6000:]

    # enough for well-formed answers
    sft = stage("sft", "batch_size=16", "optimizer.lr=2e-3", "vars.sft_steps=40")
    nodes = on_hosts(cluster, 2, *sft, MAX_RESTARTS="1")
    kill_a_rank(nodes[1], quickstart / "sft")
    statuses, said = outputs(nodes)
    assert statuses == [0, 0], said[-6000:]
    assert "starting again, 1 of 1 times" in said
    assert [entry["step"] for entry in metrics(quickstart / "sft")] == list(range(1, 41))
    assert said.count("sft step 2/40 ") == 1, "it began anew instead of going on"

    on_one_host(cluster, stage("make-warmup-pairs"))
    on_one_host(cluster, stage("upcycle"))
    submit(cluster, 2, stage("warmup", "batch_size=8"))
    assert [entry["grad_norm"] > 0 for entry in metrics(quickstart / "warmup")] == [True, True]

    # servers listen where the launcher says, and take weights from ranks of other hosts
    # (BroadcastSync), then from a folder (DiskSync)
    python = mock_sglang.python(quickstart / "python")
    small = ["prompts_per_step=8", "sampling.n=2", "rollout.kind=sglang", "rollout.gpus=[0]"]
    small.append(f"rollout.python={python}")
    submit(cluster, 3, stage("align", *small), ENGINE_NODES="1")
    beside = ["rollout.engines=2", "rollout.nodes=2", f"rollout.sync_folder={quickstart / 'sync'}"]
    submit(cluster, 2, stage("rlvr", *small, *beside))
    for name in ("align", "rlvr"):
        entries = metrics(quickstart / name)
        assert [entry["weight_version"] for entry in entries] == [1, 2]
        assert all(entry["logprob_mismatch"] < 1e-4 for entry in entries)
        assert all(entry["format_rate"] > 0 for entry in entries)
    assert all(entry["discriminator_grad_norm"] > 0 for entry in metrics(quickstart / "align"))

    on_one_host(cluster, stage("evaluate", "vars.stage=rlvr"))
    result = json.loads((quickstart / "rlvr" / "eval.json").read_text())
    assert (result["model"], result["rows"]) == (f"{quickstart}/rlvr/hf", 24)
    assert result["metrics"]["format_rate"]["value"] > 0


def test_a_host_that_is_cut_off_ends_the_job_and_a_restart_ends_as_if_it_had_not_been(
    cluster: dict[str, str], quickstart: Path
) -> None:
    small = [f"model.path={quickstart}/tiny", "batch_size=8", "model.parallel.tensor=2"]
    length = ["vars.sft_steps=16", "vars.save_every=2"]

    def job(name: str) -> list[str]:
        return arguments("sft", quickstart, *small, *length, f"run.dir={quickstart / name}")

    nodes = on_hosts(cluster, 2, *job("cut"))
    wait_for(lambda: checkpoints(quickstart / "cut"), nodes[0])
    cable = f"{cluster['CLUSTER']}v2"
    run("ip", "link", "set", cable, "down")
    began = time.monotonic()
    statuses, said = outputs(nodes)
    seconds = time.monotonic() - began
    run("ip", "link", "set", cable, "up")
    assert statuses == [1, 1], said[-6000:]
    assert "launch: node 1 is gone" in said and "node 1: node 0 is gone; ending" in said
    print(f"both hosts ended within {seconds:.0f} s")
    assert 0 < len(metrics(quickstart / "cut")) < 16

    statuses, said = outputs(on_hosts(cluster, 2, *job("cut")))
    assert statuses == [0, 0], said[-6000:]
    assert "cut step 1/16 " not in said
    statuses, said = outputs(on_hosts(cluster, 1, *job("whole"), NPROC_PER_NODE="2"))
    assert statuses == [0], said[-6000:]
    cut, whole = (quickstart / name / "hf" / "model.safetensors" for name in ("cut", "whole"))
    assert cut.read_bytes() == whole.read_bytes()


def test_doctor_has_a_row_for_each_host(cluster: dict[str, str], quickstart: Path) -> None:
    stage = arguments("sft", quickstart)
    first, second = on_hosts(cluster, 2, "doctor", "--json", *stage)
    said = first.communicate(timeout=600)[0]
    assert (first.returncode, second.wait(300)) == (0, 0), said + second.communicate()[0]
    printed = json.loads(said[said.index("{\n") : said.rindex("}") + 1])
    assert printed["problems"] == []
    assert [node["host"] for node in printed["nodes"]] == ["host-1", "host-2"]
    assert [node["addresses"]["eth0"] for node in printed["nodes"]] == [
        [f"{NETWORK}.{host}"] for host in (1, 2)
    ]
    assert [node["shared"] for node in printed["nodes"]] == [True, True]
    assert all(abs(node["clock"]) < 60 for node in printed["nodes"])


def test_a_slurm_job_that_is_asked_to_end_saves_on_all_hosts_and_goes_on_when_requeued(
    cluster: dict[str, str], quickstart: Path
) -> None:
    out = quickstart / "preempted"
    small = [f"model.path={quickstart}/tiny", f"run.dir={out}", "batch_size=8"]
    stage = arguments("sft", quickstart, *small, "vars.sft_steps=16", "vars.save_every=100")
    job = subprocess.Popen(
        ["sbatch", "--nodes", "2", "launch/slurm.sbatch", *stage],
        cwd=ROOT,
        env=cluster | {"NPROC_PER_NODE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wait_for(lambda: metrics(out), job)
    # the launcher on the second host, which srun would signal
    launcher, *_ = started_by(
        job.pid,
        lambda p: (
            p.cmdline()[1:2] != []
            and p.cmdline()[1].endswith("launch/node.py")
            and p.environ()["SLURM_NODEID"] == "1"
        ),
    )
    launcher.send_signal(signal.SIGUSR1)
    said = job.communicate(timeout=600)[0]
    assert job.returncode == 0, said[-6000:]
    assert "node 1 got SIGUSR1" in said and "queueing job" in said
    assert [entry["step"] for entry in metrics(out)] == list(range(1, 17))
    assert said.count("preempted step 1/16 ") == 1, "it began anew instead of going on"
