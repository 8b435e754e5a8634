"""The fronts: what --dry-run says, and that what it says is what is run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SFT = "sft --config configs/quickstart/sft.yaml vars.dir=/r"
RLVR = "rlvr --config configs/quickstart/rlvr.yaml vars.dir=/r rollout.kind=local"
SERVERS = RLVR.replace("kind=local", "kind=sglang rollout.gpus=[0]")
QUOTED = SERVERS.replace("rollout.gpus=[0]", "'rollout.gpus=[0]'")
MLP = "MLP_WORKER_NUM=2 MLP_WORKER_RACK_RANK_INDEX=1 MLP_WORKER_0_HOST=worker-0 MLP_WORKER_GPU=8"
ALONE_AT = "--standalone --local-addr 127.0.0.1"
ALONE = f"python launch/ranks.py {ALONE_AT}"

DRY_RUNS = {
    f"bash launch/torchrun.sh --dry-run {SFT}": f"""
# node 0 of 1: trainer
{ALONE} --nproc-per-node gpu -m prism_megatron {SFT}
""",
    f"""NNODES=2 NODE_RANK=1 MASTER_ADDR=node-a MASTER_PORT=30000 NPROC_PER_NODE=4 INTERFACE=ib0 \
bash launch/torchrun.sh --dry-run {SFT}""": f"""
# node 0 of 2: trainer
GLOO_SOCKET_IFNAME=ib0 NCCL_SOCKET_IFNAME=ib0 python launch/ranks.py --nnodes 2 --node-rank 0 \
--master-addr node-a --master-port 30000 --nproc-per-node 4 -m prism_megatron {SFT}
# node 1 of 2: trainer
GLOO_SOCKET_IFNAME=ib0 NCCL_SOCKET_IFNAME=ib0 python launch/ranks.py --nnodes 2 --node-rank 1 \
--master-addr node-a --master-port 30000 --nproc-per-node 4 -m prism_megatron {SFT}
""",
    # engines on the trainers' nodes
    f"""NNODES=2 NODE_RANK=0 MASTER_ADDR=node-a \
bash launch/torchrun.sh --dry-run {RLVR} rollout.engines=2 rollout.nodes=2""": f"""
# node 0 of 2: trainer
RAY_USAGE_STATS_ENABLED=0 RAY_raylet_start_wait_time_s=180 \
ray start --head --port 29502 --include-dashboard false \
--node-ip-address ADDRESS_OF_NODE_0 --temp-dir FOLDER
RAY_ADDRESS=ADDRESS_OF_NODE_0:29502 python launch/ranks.py --nnodes 2 --node-rank 0 \
--master-addr node-a --master-port 29500 --nproc-per-node gpu -m prism_megatron {RLVR} \
rollout.engines=2 rollout.nodes=2
# node 1 of 2: trainer
RAY_USAGE_STATS_ENABLED=0 RAY_raylet_start_wait_time_s=180 \
ray start --address ADDRESS_OF_NODE_0:29502 \
--node-ip-address ADDRESS_OF_NODE_1 --temp-dir FOLDER
RAY_ADDRESS=ADDRESS_OF_NODE_0:29502 python launch/ranks.py --nnodes 2 --node-rank 1 \
--master-addr node-a --master-port 29500 --nproc-per-node gpu -m prism_megatron {RLVR} \
rollout.engines=2 rollout.nodes=2
""",
    # servers listen where other nodes reach them
    f"""RAY_ADDRESS=ray:1 NNODES=2 NODE_RANK=0 MASTER_ADDR=node-a INTERFACE=ib0 \
bash launch/torchrun.sh --dry-run {SERVERS}""": f"""
# node 0 of 2: trainer
GLOO_SOCKET_IFNAME=ib0 NCCL_SOCKET_IFNAME=ib0 python launch/ranks.py --nnodes 2 --node-rank 0 \
--master-addr node-a --master-port 29500 --nproc-per-node gpu -m prism_megatron {QUOTED} \
rollout.interface=ib0
# node 1 of 2: trainer
GLOO_SOCKET_IFNAME=ib0 NCCL_SOCKET_IFNAME=ib0 python launch/ranks.py --nnodes 2 --node-rank 1 \
--master-addr node-a --master-port 29500 --nproc-per-node gpu -m prism_megatron {QUOTED} \
rollout.interface=ib0
""",
    # a running Ray cluster is not started again
    f"""RAY_ADDRESS=ray:1 NNODES=2 NODE_RANK=0 MASTER_ADDR=node-a \
bash launch/torchrun.sh --dry-run {RLVR}""": f"""
# node 0 of 2: trainer
python launch/ranks.py --nnodes 2 --node-rank 0 --master-addr node-a --master-port 29500 \
--nproc-per-node gpu -m prism_megatron {RLVR}
# node 1 of 2: trainer
python launch/ranks.py --nnodes 2 --node-rank 1 --master-addr node-a --master-port 29500 \
--nproc-per-node gpu -m prism_megatron {RLVR}
""",
    "NNODES=2 NODE_RANK=0 MASTER_ADDR=node-a bash launch/torchrun.sh --dry-run doctor": """
# node 0 of 2: trainer
python launch/ranks.py --nnodes 2 --node-rank 0 --master-addr node-a --master-port 29500 \
--nproc-per-node 1 -m prism_megatron doctor
# node 1 of 2: trainer
python launch/ranks.py --nnodes 2 --node-rank 1 --master-addr node-a --master-port 29500 \
--nproc-per-node 1 -m prism_megatron doctor
""",
    f"SLURM_NNODES=1 SLURM_JOB_ID=41 bash launch/slurm.sbatch --dry-run {SFT}": f"""
# in the job: NNODES=1 ENGINE_NODES=0 MASTER_PORT=20164 RUN_ID=slurm-41 srun --kill-on-bad-exit=1 \
bash launch/torchrun.sh {SFT}
# node 0 of 1: trainer
{ALONE} --nproc-per-node gpu -m prism_megatron {SFT}
""",
    f"ENGINE_NODES=2 SLURM_NNODES=3 bash launch/slurm.sbatch --dry-run {RLVR} rollout.engines=2 "
    "rollout.nodes=2": f"""
# in the job: NNODES=3 ENGINE_NODES=2 MASTER_PORT=20000 RUN_ID=slurm-0 srun --kill-on-bad-exit=1 \
bash launch/torchrun.sh {RLVR} rollout.engines=2 rollout.nodes=2
# node 0 of 3: trainer
RAY_USAGE_STATS_ENABLED=0 RAY_raylet_start_wait_time_s=180 \
ray start --head --port 20002 --include-dashboard false \
--node-ip-address ADDRESS_OF_NODE_0 --temp-dir FOLDER
RAY_ADDRESS=ADDRESS_OF_NODE_0:20002 {ALONE} --nproc-per-node gpu \
-m prism_megatron {RLVR} rollout.engines=2 rollout.nodes=2 rollout.node_resource=engine_node
# node 1 of 3: engines
RAY_USAGE_STATS_ENABLED=0 RAY_raylet_start_wait_time_s=180 \
ray start --address ADDRESS_OF_NODE_0:20002 \
--resources '{{"engine_node": 1}}' --node-ip-address ADDRESS_OF_NODE_1 --temp-dir FOLDER
# node 2 of 3: engines
RAY_USAGE_STATS_ENABLED=0 RAY_raylet_start_wait_time_s=180 \
ray start --address ADDRESS_OF_NODE_0:20002 \
--resources '{{"engine_node": 1}}' --node-ip-address ADDRESS_OF_NODE_2 --temp-dir FOLDER
""",
    f"{MLP} bash launch/mlp.sh --dry-run {SFT}": f"""
# node 0 of 2: trainer
python launch/ranks.py --nnodes 2 --node-rank 0 --master-addr worker-0 --master-port 10086 \
--nproc-per-node 8 -m prism_megatron {SFT}
# node 1 of 2: trainer
python launch/ranks.py --nnodes 2 --node-rank 1 --master-addr worker-0 --master-port 10086 \
--nproc-per-node 8 -m prism_megatron {SFT}
""",
    f"{MLP} SINGLENODE=true bash launch/mlp.sh --dry-run {RLVR}": f"""
# node 0 of 1: trainer
{ALONE} --nproc-per-node 8 -m prism_megatron {RLVR}
""",
}


def shell(command: str, path: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    """Run it from the root, with nothing of this process's launcher or cluster around it."""
    environment = {"PATH": f"{path}:{Path(sys.executable).parent}:{os.defpath}"}
    return subprocess.run(
        ["bash", "-c", command],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | variables,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("command", DRY_RUNS)
def test_a_dry_run_says_what_would_run_where(command: str) -> None:
    ran = shell(command)
    assert (ran.returncode, ran.stderr) == (0, "")
    said = ran.stdout.replace(f"{ROOT}/", "").replace(" \n", "\n")
    said = re.sub(r"/tmp/prism-ray-[0-9a-f]{10}\b", "FOLDER", said)
    assert said == DRY_RUNS[command].lstrip()


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("MLP_WORKER_NUM=2 bash launch/mlp.sh sft", "RACK_RANK_INDEX MLP_WORKER_0_HOST missing"),
        ("SINGLENODE=yes bash launch/mlp.sh sft", "SINGLENODE is true or false, not yes"),
        (f"{MLP} MLP_WORKER_NUM=1x bash launch/mlp.sh {SFT}", "NNODES='1x' is not a number"),
        ("bash launch/torchrun.sh stf", "unknown command 'stf'"),
    ],
)  # fmt: skip
def test_a_front_says_what_is_wrong(command: str, said: str) -> None:
    ran = shell(command)
    assert ran.returncode == 2 and said in ran.stderr, ran.stderr


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A checkout beside a bin folder with stand-ins that write down what they are asked: python of
    the launcher, which has the ranks end with $STATUS, and Slurm's commands."""
    repo, tools = tmp_path / "repo", tmp_path / "bin"
    for folder in ("launch", "configs"):
        shutil.copytree(ROOT / folder, repo / folder)
    tools.mkdir()
    for name, body in (
        (
            "python",
            f'if [[ $1 != */ranks.py ]]; then exec {sys.executable} "$@"; fi\n'
            f'echo "ranks ${{*:2}}" >>{tmp_path}/log\nexit $STATUS',
        ),
        (
            "srun",
            f'echo "srun $*" >>{tmp_path}/log\nwhile [[ $1 == --* ]]; do shift; done\n'
            'SLURM_NODEID=0 "$@"',
        ),
        (
            "scontrol",
            f'echo "scontrol $*" >>{tmp_path}/log\n'
            "if [[ $1 == show ]]; then echo node-a; echo node-b; fi",
        ),
    ):
        (tools / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tools / name).chmod(0o755)
    return tmp_path


@pytest.mark.parametrize(
    ("status", "requeues", "restarted", "again"),
    [
        (0, 2, 0, False),
        (1, 0, 0, False),
        (1, 2, 1, True),
        (1, 2, 2, False),
        (2, 2, 0, False),
        (75, 0, 9, True),
    ],
)
def test_a_slurm_job_that_saved_is_queued_again_and_if_asked_one_that_failed(
    machine: Path, status: int, requeues: int, restarted: int, again: bool
) -> None:
    ran = shell(
        # Slurm runs a copy
        f"cp launch/slurm.sbatch {machine}/script && bash {machine}/script {SFT}",
        path=str(machine / "bin"),
        STATUS=str(status),
        SLURM_SUBMIT_DIR=str(machine / "repo"),
        SLURM_NNODES="1",
        SLURM_JOB_ID="7",
        SLURM_JOB_NODELIST="node-[a-b]",
        SLURM_CPUS_PER_TASK="64",
        SLURM_RESTART_COUNT=str(restarted),
        MAX_REQUEUES=str(requeues),
    )
    assert ran.returncode == status, ran.stderr
    log = (machine / "log").read_text().splitlines()
    assert log == [
        "scontrol show hostnames node-[a-b]",
        f"srun --kill-on-bad-exit=1 --cpus-per-task=64 bash launch/torchrun.sh {SFT}",
        f"ranks {ALONE_AT} --nproc-per-node gpu -m prism_megatron {SFT}",
        *(["scontrol requeue 7"] if again else []),
    ]


@pytest.mark.parametrize("status", [0, 1, 75])
def test_singlenode_ends_with_the_stages_status(machine: Path, status: int) -> None:
    ran = shell(
        f"SINGLENODE=true MLP_WORKER_NUM=4 MLP_WORKER_GPU=2 bash {machine}/repo/launch/mlp.sh "
        + SFT,
        path=str(machine / "bin"),
        STATUS=str(status),
    )
    assert ran.returncode == status, ran.stderr
    [line] = (machine / "log").read_text().splitlines()
    assert line == f"ranks {ALONE_AT} --nproc-per-node 2 -m prism_megatron {SFT}"
