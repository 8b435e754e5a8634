"""launch/node.py with stand-ins for torchrun and Ray: what runs, how it ends, what is left."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.processes import matching

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"
SFT = ("sft", "--config", "configs/quickstart/sft.yaml", "vars.dir=/r")
RLVR = ("rlvr", "--config", "configs/quickstart/rlvr.yaml", "vars.dir=/r", "rollout.kind=local")

# in place of launch/ranks.py: a torchrun with one rank, in a session of its own as torchrun has it
PYTHON = """
if [[ $1 != */ranks.py ]]; then exec {python} "$@"; fi
log={folder}/node-$NODE_RANK
echo "${{RAY_ADDRESS-}} ${{GLOO_SOCKET_IFNAME-}} ${{NCCL_SOCKET_IFNAME-}} ${{*:2}}" >>$log.ranks
behaviour=BEHAVIOUR_$NODE_RANK
while [[ -e {folder}/hold ]]; do read -rt 0.05 <>{folder}/nothing || :; done
setsid bash {folder}/rank.sh ${{!behaviour}} $log &
wait $!
"""
RANK = """
attempt=$(wc -l <$2.ranks)
case $1 in
    saves) for name in TERM USR1; do trap "echo $name >>$2.signals; exit 75" $name; done ;;
    ignores) trap 'echo TERM >>$2.signals' TERM ;;
    killed) kill -KILL $$ ;;
    second) exit $((attempt == 1)) ;;
    stuck) ;;
    *) exit $1 ;;
esac
touch $2.up
while :; do sleep 0.05; done
"""
RAY = """
echo "$*" >>{folder}/node-$NODE_RANK.ray
[[ -z ${{NO_RAY-}} ]] || exit 3
setsid {folder}/raylet &
# it is up when ray start ends
until [[ -e {folder}/raylet-$NODE_RANK ]]; do sleep 0.02; done
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """start(node, behaviour, *arguments, VARIABLE=value ...) -> the launcher on that node."""
    tools = tmp_path / "bin"
    tools.mkdir()
    os.mkfifo(tmp_path / "nothing")
    places = {"python": sys.executable, "folder": tmp_path}
    for path, body in (
        (tools / "python", PYTHON.format(**places)),
        (tools / "ray", RAY.format(**places)),
        (tmp_path / "raylet", f"touch {tmp_path}/raylet-$NODE_RANK; while :; do sleep 0.05; done"),
        (tmp_path / "rank.sh", RANK),
    ):
        # not through env, whose successor would not have the script's name
        path.write_text(f"#!{shutil.which('bash')}\n{body}")
        path.chmod(0o755)
    started: list[subprocess.Popen[str]] = []

    def start(
        node: int, behaviour: str, *arguments: str, **variables: str
    ) -> subprocess.Popen[str]:
        environment = os.environ | {
            "PATH": f"{tools}:{os.environ['PATH']}",
            "LAUNCH_TEST": str(tmp_path),
            "NODE_RANK": str(node),
            "MASTER_ADDR": "127.0.0.1",
            "INTERFACE": "lo",
            f"BEHAVIOUR_{node}": behaviour,
            "NPROC_PER_NODE": "2",
            "JOIN_SECONDS": "300",
        }
        process = subprocess.Popen(
            [sys.executable, str(LAUNCH / "node.py"), *(arguments or SFT)],
            cwd=ROOT,
            env=environment | variables,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()
    left = running(tmp_path)
    for other in left:
        other.kill()
    assert not left, left


def running(folder: Path, program: str = "", **environment: str) -> list[psutil.Process]:
    """Processes that a launcher started, by the mark in their environment: those of a program, if
    named, and with these variables."""
    wanted = {"LAUNCH_TEST": str(folder), **environment}.items()
    return matching(
        psutil.process_iter(),
        lambda p: program in ("", p.name()) and wanted <= p.environ().items(),
    )


def free_ports() -> str:
    """The first of three ports in a row that nobody has."""
    for first in range(20000 + os.getpid() % 1000 * 8, 32000, 3):
        try:
            for port in range(first, first + 3):
                with socket.socket() as probe:
                    probe.bind(("", port))
            return str(first)
        except OSError:
            continue
    raise AssertionError("no free ports")


def wait_for(*files: Path) -> None:
    deadline = time.monotonic() + 240
    while not all(file.exists() for file in files):
        assert time.monotonic() < deadline, f"{files} did not come"
        time.sleep(0.02)


def ended(*processes: subprocess.Popen[str]) -> tuple[list[int], str]:
    """Exit statuses, and everything that was said."""
    said = "".join(process.communicate(timeout=400)[1] for process in processes)
    return [process.returncode for process in processes], said


@pytest.mark.parametrize(("behaviour", "status"), [("0", 0), ("1", 1), ("75", 75), ("killed", 137)])
def test_one_node_ends_with_the_status_of_its_ranks(
    start: Callable[..., subprocess.Popen[str]], tmp_path: Path, behaviour: str, status: int
) -> None:
    assert ended(start(0, behaviour))[0] == [status]
    assert not running(tmp_path)


@pytest.mark.parametrize(
    ("behaviours", "status"),
    [("00", 0), (("stuck", "3"), 3), (("7", "ignores"), 7), (("75", "75"), 75), (("0", "9"), 9)],
)
def test_all_nodes_end_together_with_the_same_status(
    start: Callable[..., subprocess.Popen[str]],
    tmp_path: Path,
    behaviours: tuple[str, str],
    status: int,
) -> None:
    job = {"NNODES": "2", "MASTER_PORT": free_ports()}
    nodes = [start(node, behaviour, **job) for node, behaviour in enumerate(behaviours)]
    statuses, said = ended(*nodes)
    assert statuses == [status, status], said
    assert not running(tmp_path)


def test_an_engine_node_holds_ray_until_the_trainers_end(
    start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    port = free_ports()
    job = {"NNODES": "3", "ENGINE_NODES": "1", "MASTER_PORT": port}
    behaviours = ("saves", "saves", "0")
    nodes = [start(node, behaviour, *RLVR, **job) for node, behaviour in enumerate(behaviours)]
    wait_for(tmp_path / "node-0.up", tmp_path / "node-1.up")
    rays = [(tmp_path / f"node-{node}.ray").read_text().split() for node in range(3)]
    head = f"127.0.0.1:{int(port) + 2}"
    assert rays[0][:4] == ["start", "--head", "--port", str(int(port) + 2)]
    assert [ray[:3] for ray in rays[1:]] == [["start", "--address", head]] * 2
    assert ["--resources" in ray for ray in rays] == [False, False, True]
    assert rays[2][rays[2].index("--resources") + 1] == '{"engine_node":'
    assert len({ray[ray.index("--temp-dir") + 1] for ray in rays}) == 3
    ranks = (tmp_path / "node-1.ranks").read_text().split()
    assert ranks[:3] == [head, "lo", "lo"]
    assert ranks[3:11] == (
        f"--nnodes 2 --node-rank 1 --master-addr 127.0.0.1 --master-port {port}".split()
    )
    assert ranks[11:] == [
        "--nproc-per-node", "2", "-m", "prism_megatron", *RLVR, "rollout.node_resource=engine_node",
    ]  # fmt: skip
    assert not (tmp_path / "node-2.ranks").exists()
    # the host with the engines is wanted back
    nodes[2].send_signal(signal.SIGTERM)
    statuses, said = ended(*nodes)
    assert statuses == [75, 75, 75], said
    assert "node 2 got SIGTERM" in said
    for node in range(2):
        assert (tmp_path / f"node-{node}.signals").read_text() == "TERM\n"
    assert not running(tmp_path)


def test_ray_that_ends_ends_the_job(
    start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    job = {"NNODES": "2", "ENGINE_NODES": "1", "MASTER_PORT": free_ports()}
    nodes = [start(node, "stuck", *RLVR, **job) for node in range(2)]
    wait_for(tmp_path / "node-0.up")
    # whatever else has that name has just been forked by it
    running(tmp_path, "raylet", NODE_RANK="1")[0].kill()
    statuses, said = ended(*nodes)
    assert statuses == [1, 1] and "node 1: Ray ended; see /tmp/prism-ray-" in said


def test_ray_that_does_not_start_ends_the_job(start: Callable[..., subprocess.Popen[str]]) -> None:
    job = {"NNODES": "2", "MASTER_PORT": free_ports()}
    nodes = [start(0, "0", *RLVR, **job), start(1, "0", *RLVR, **job, NO_RAY="1")]
    statuses, said = ended(*nodes)
    assert statuses == [3, 3] and "node 1: ray start failed" in said


@pytest.mark.parametrize(
    ("sent", "got"), [("SIGTERM", "TERM"), ("SIGUSR1", "USR1"), ("SIGINT", "TERM")]
)
def test_a_signal_to_one_node_has_the_ranks_of_all_save(
    start: Callable[..., subprocess.Popen[str]], tmp_path: Path, sent: str, got: str
) -> None:
    job = {"NNODES": "2", "MASTER_PORT": free_ports(), "MAX_RESTARTS": "3"}
    nodes = [start(node, "saves", **job) for node in range(2)]
    wait_for(tmp_path / "node-0.up", tmp_path / "node-1.up")
    nodes[1].send_signal(getattr(signal, sent))
    statuses, said = ended(*nodes)
    assert statuses == [75, 75], said
    for node in range(2):
        assert (tmp_path / f"node-{node}.signals").read_text() == f"{got}\n"


def test_a_signal_waits_for_ranks_that_are_being_started(
    start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    (tmp_path / "hold").touch()
    node = start(0, "saves")
    wait_for(tmp_path / "node-0.ranks")
    node.send_signal(signal.SIGTERM)
    assert node.stderr is not None
    while "node 0 got SIGTERM" not in node.stderr.readline():
        assert node.poll() is None
    (tmp_path / "hold").unlink()
    # a rank that can't save yet ends of it
    assert ended(node)[0] in ([75], [128 + signal.SIGTERM])


def test_ranks_that_do_not_end_after_a_signal_are_ended(
    start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    node = start(0, "ignores", SAVE_SECONDS="1")
    wait_for(tmp_path / "node-0.up")
    node.send_signal(signal.SIGTERM)
    statuses, said = ended(node)
    assert statuses == [128 + signal.SIGTERM] and "1 s after SIGTERM (SAVE_SECONDS)" in said
    assert not running(tmp_path)


def test_ctrl_c_twice_does_not_wait(
    start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    node = start(0, "ignores")
    wait_for(tmp_path / "node-0.up")
    node.send_signal(signal.SIGINT)
    wait_for(tmp_path / "node-0.signals")
    node.send_signal(signal.SIGINT)
    assert ended(node)[0] == [128 + signal.SIGINT]
    assert not running(tmp_path)


def test_dead_ranks_are_started_again_on_all_nodes(
    start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    job = {"NNODES": "2", "MASTER_PORT": free_ports(), "MAX_RESTARTS": "1"}
    statuses, said = ended(start(0, "second", **job), start(1, "0", **job))
    assert statuses == [0, 0] and "starting again, 1 of 1 times" in said
    assert len((tmp_path / "node-1.ranks").read_text().splitlines()) == 2


@pytest.mark.parametrize("status", [2, 75])
def test_what_a_restart_does_not_mend_is_not_started_again(
    start: Callable[..., subprocess.Popen[str]], tmp_path: Path, status: int
) -> None:
    assert ended(start(0, str(status), MAX_RESTARTS="3"))[0] == [status]
    assert len((tmp_path / "node-0.ranks").read_text().splitlines()) == 1


@pytest.mark.parametrize(("victim", "status"), [("guard", 75), ("node", 1)])
def test_a_killed_launcher_leaves_nothing_and_ends_the_others(
    start: Callable[..., subprocess.Popen[str]], tmp_path: Path, victim: str, status: int
) -> None:
    job = {"NNODES": "2", "MASTER_PORT": free_ports()}
    nodes = [start(node, "saves", **job) for node in range(2)]
    wait_for(tmp_path / "node-0.up", tmp_path / "node-1.up")
    guard = psutil.Process(nodes[1].pid)
    [inside] = guard.children()
    (guard if victim == "guard" else inside).kill()
    assert ended(nodes[0])[0] == [status]
    nodes[1].communicate(timeout=400)
    psutil.wait_procs([inside], timeout=240)
    assert not running(tmp_path)


def test_a_node_of_another_job_is_refused(start: Callable[..., subprocess.Popen[str]]) -> None:
    job = {"NNODES": "2", "MASTER_PORT": free_ports()}
    first = start(0, "0", **job)
    stranger = start(1, "0", **job, RUN_ID="another")
    statuses, said = ended(stranger)
    assert statuses == [2] and "node 1 was started with ['another'," in said
    assert ended(first, start(1, "0", **job))[0] == [0, 0]


def test_a_node_alone_says_who_is_missing(start: Callable[..., subprocess.Popen[str]]) -> None:
    job = {"NNODES": "3", "MASTER_PORT": free_ports(), "JOIN_SECONDS": "1"}
    statuses, said = ended(start(0, "0", **job))
    assert statuses == [1] and "nodes [1, 2] not joined within 1 s (JOIN_SECONDS)" in said
    statuses, said = ended(start(2, "0", **job))
    assert statuses == [2] and "did not reach node 0 at 127.0.0.1" in said


def test_a_port_in_use_is_named(start: Callable[..., subprocess.Popen[str]]) -> None:
    port = free_ports()
    with socket.socket() as taken:
        taken.bind(("", int(port) + 1))
        taken.listen()
        statuses, said = ended(start(0, "0", NNODES="2", MASTER_PORT=port))
    assert statuses == [2] and f"port {int(port) + 1} of node 0 can't be used" in said


@pytest.mark.parametrize(
    ("variables", "arguments", "said"),
    [
        ({"NNODES": "two"}, SFT, "NNODES='two' is not a number from 1"),
        ({"NNODES": "2", "NODE_RANK": "2"}, SFT, "NODE_RANK='2' is not a number from 0 to 1"),
        ({"NNODES": "2", "NODE_RANK": ""}, SFT, "NODE_RANK is missing, which 2 nodes"),
        ({"NNODES": "2", "MASTER_ADDR": ""}, SFT, "MASTER_ADDR is missing"),
        ({"NPROC_PER_NODE": "all"}, SFT, "NPROC_PER_NODE='all' is not a number from 1"),
        ({"MASTER_PORT": "65534"}, SFT, "MASTER_PORT='65534' is not a number from 1024 to 65533"),
        ({"ENGINE_NODES": "1"}, SFT, "ENGINE_NODES='1' is not a number from 0 to 0"),
        ({"NNODES": "2", "ENGINE_NODES": "1"}, SFT, "sft has no engines of their own"),
        ({"NNODES": "3", "ENGINE_NODES": "2"}, RLVR, "rollout.nodes=1, but ENGINE_NODES=2"),
        (
            {"NNODES": "2", "ENGINE_NODES": "1", "RAY_ADDRESS": "a:1"},
            RLVR,
            "RAY_ADDRESS names a running one",
        ),
        (
            {"NNODES": "2", "INTERFACE": ""},
            (*RLVR[:-1], "rollout.kind=sglang", "rollout.gpus=[0]"),
            "sglang servers listen on loopback, which ranks of other nodes do not reach; set I",
        ),
        (
            {},
            (*RLVR, "rollout.engines=4", "rollout.nodes=4"),
            "rollout.nodes=4, but the job has 1 (NNODES)",
        ),
        ({"INTERFACE": "no0", "NNODES": "2"}, SFT, "INTERFACE=no0"),
        ({"INTERFACE": "", "NNODES": "2"}, SFT, "MASTER_ADDR=127.0.0.1 is 127.0.0.1 on node 0"),
        ({}, ("stf",), "did you mean sft"),
        ({}, (*SFT, "modle.path=x"), "modle"),
    ],
)
def test_what_is_wrong_is_said_before_anything_runs(
    start: Callable[..., subprocess.Popen[str]],
    tmp_path: Path,
    variables: dict[str, str],
    arguments: tuple[str, ...],
    said: str,
) -> None:
    statuses, words = ended(start(0, "0", *arguments, **variables))
    assert statuses == [2] and said in words, words
    assert not (tmp_path / "node-0.ranks").exists()


@pytest.mark.parametrize(("command", "status"), [("exit 75", 75), ("kill -KILL $BASHPID", 137)])
def test_torchrun_ends_with_its_ranks_status(command: str, status: int) -> None:
    torchrun = [sys.executable, str(LAUNCH / "ranks.py"), "--standalone", "--nproc-per-node", "2"]
    ran = subprocess.run([*torchrun, "--no-python", "bash", "-c", command], capture_output=True)
    assert ran.returncode == status
