"""Server processes: their start, what they say when it fails, and that none is left behind."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from prism_megatron.config import schema
from prism_megatron.config.schema import Sampling
from prism_megatron.rollout import guard, outer_group, refit, sglang, vllm
from prism_megatron.rollout.engine import EngineDied
from prism_megatron.rollout.ray_fleet import check_reachable
from prism_megatron.rollout.server import Endpoint, Server, ServerKind, address_of, outside_of_ranks
from prism_megatron.rollout.weight_sync import BroadcastSync
from prism_megatron.types import Prompt, Rollout
from tests.processes import gone

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tests" / "fixtures" / "tiny_server.py"


def ask(endpoint: Endpoint, api_key: str, path: str = "") -> dict[str, Any]:
    url = f"{endpoint.url}/{path}"
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {api_key}"})
    with urllib.request.urlopen(request, timeout=5) as answer:
        found: dict[str, Any] = json.load(answer)
    return found


class Client:
    """Speaks to tiny_server.py, which has no engine: only health is asked for here."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint

    async def generate(self, prompt: Prompt, sampling: Sampling, key: str) -> list[Rollout]:
        raise NotImplementedError

    async def health(self) -> None:
        await asyncio.to_thread(ask, self.endpoint, self.endpoint.api_key)

    async def weight_version(self) -> int:
        found = await asyncio.to_thread(ask, self.endpoint, self.endpoint.api_key)
        return int(found["weight_version"])

    async def abort(self) -> None:
        raise NotImplementedError

    async def close(self) -> None:
        pass

    async def sleep(self) -> None:
        await asyncio.to_thread(ask, self.endpoint, self.endpoint.api_key, "sleep")

    async def wake(self, part: str) -> None:
        await asyncio.to_thread(ask, self.endpoint, self.endpoint.api_key, part)


def command(mode: str, endpoint: Endpoint) -> tuple[list[str], dict[str, str]]:
    address = [endpoint.host, str(endpoint.port), endpoint.api_key]
    return [sys.executable, str(SCRIPT), *address], {"TINY_SERVER_MODE": mode}


def server(log: Path, mode: str = "serve", gpus: tuple[int, ...] = ()) -> Server:
    kind = ServerKind(partial(command, mode), Client)
    return Server(kind, log=log, gpus=gpus, health_timeout=5)


@pytest.mark.parametrize("program", [sglang, vllm])
def test_a_key_is_told_by_the_environment_alone(program: Any) -> None:
    """Every user of the host sees command lines."""
    told, environment = program.server_command(Path("none"), host="h", port=1, api_key="the-key")
    assert not any("the-key" in word for word in told)
    assert "the-key" in environment.values()


def test_a_server_agrees_with_the_trainer_on_what_nccl_needs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What SGLang would otherwise set to 0; where the trainer says something, that."""
    monkeypatch.delenv("NCCL_CUMEM_ENABLE", raising=False)
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "0")
    monkeypatch.setenv("LOCAL_RANK", "3")
    found = outside_of_ranks()
    assert (found["NCCL_CUMEM_ENABLE"], found["NCCL_NVLS_ENABLE"]) == ("1", "0")
    assert "LOCAL_RANK" not in found


def test_sglang_gets_its_key_as_the_argument_that_it_takes_it_by(tmp_path: Path) -> None:
    """From a stand-in for SGLang, which says what it was given and what others see of that."""
    package = tmp_path / "sglang"
    managers = package / "srt" / "managers"
    managers.mkdir(parents=True)
    (managers / "tokenizer_manager.py").write_text(
        "class TokenizerManager:\n    def _handle_abort_req(self, request): pass\n"
    )
    says = "import json, pathlib, sys\n"
    says += "seen = pathlib.Path('/proc/self/cmdline').read_text()\n"
    says += "assert __name__ == '__main__'\n"
    (package / "launch_server.py").write_text(says + "print(json.dumps([sys.argv[1:], seen]))")
    told, environment = sglang.server_command(tmp_path, host="h", port=7, api_key="the-key")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    environment = os.environ | environment | {"PYTHONPATH": path}
    output = subprocess.check_output(told, env=environment, cwd=tmp_path, text=True)
    given, seen = json.loads(output)
    assert given == [*told[3:], "--api-key", "the-key"] and "the-key" not in seen


def test_a_server_that_gets_the_port_of_its_predecessor_is_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It has another key, and is in no group yet, where the old one is asked to leave."""
    monkeypatch.setattr(
        refit, "connect", lambda kind, hf_dir, endpoint: SimpleNamespace(to=endpoint)
    )
    engines = refit.ServerRefit(schema.Rollout(kind="sglang", gpus=(0,)), None, Path())  # type: ignore[arg-type]
    old, new = (engines._client(Endpoint("127.0.0.1", 7, key)) for key in ("old", "new"))
    assert (old.to.api_key, new.to.api_key) == ("old", "new")
    assert engines._client(Endpoint("127.0.0.1", 7, "new")) is new

    asked: list[Any] = []
    monkeypatch.setattr(outer_group, "join", lambda *arguments: "a group")
    monkeypatch.setattr(outer_group, "leave", asked.append)
    sync = object.__new__(BroadcastSync)
    sync.engine_ranks, sync.host, sync.timeout = 1, "127.0.0.1", 5
    sync._joined, sync._group = [], None
    sync.backend = SimpleNamespace(process_group_backend="gloo")  # type: ignore[assignment]
    for client in (old, new):
        client.url = client.to.url
        client.join_group = lambda *arguments, client=client: asked.append((client, arguments[-2]))
        client.leave_group = lambda name, client=client: asked.append((name, client))
    for servers in ([old], [old], [new], [new]):
        sync._join(servers)
    (first, name), *left, (second, another) = asked
    assert (first, second) == (old, new) and name != another
    assert len(left) == 2 and "a group" in left and (name, old) in left


def test_a_server_has_its_gpus_and_its_key_and_ends_with_its_children(tmp_path: Path) -> None:
    async def run() -> None:
        made = server(tmp_path / "logs" / "engine.log", gpus=(5, 3))
        endpoint = await made.start(30)
        assert endpoint.host == "127.0.0.1"
        found = ask(endpoint, endpoint.api_key)
        assert found["gpus"] == "5,3"
        with pytest.raises(urllib.error.HTTPError, match="401"):
            ask(endpoint, "")
        assert endpoint.api_key not in repr(endpoint)
        await made.health()
        assert not gone(found["pids"], within=0.2)
        await made.stop()
        assert gone(found["pids"], within=0.2)
        with pytest.raises(EngineDied, match="ended with status"):
            await made.health()

    asyncio.run(run())


def test_a_server_is_no_rank_of_the_trainer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would wait for a store that torchrun keeps for the ranks."""
    told = ("TORCHELASTIC_USE_AGENT_STORE", "RANK", "LOCAL_RANK", "MASTER_PORT", "SLURM_PROCID")
    for name in (*told, "PYTORCH_CUDA_ALLOC_CONF", "HF_HOME"):
        monkeypatch.setenv(name, "1")

    async def run() -> None:
        made = server(tmp_path / "engine.log")
        endpoint = await made.start(30)
        found = set(ask(endpoint, endpoint.api_key)["environment"])
        await made.stop()
        assert {"PATH", "HF_HOME", "TINY_SERVER_MODE"} <= found
        assert not found & {*told, "PYTORCH_CUDA_ALLOC_CONF"}

    asyncio.run(run())


def test_a_server_that_ends_at_its_start_has_the_last_word(tmp_path: Path) -> None:
    log = tmp_path / "engine.log"
    with pytest.raises(EngineDied, match=f"status 3; the last lines of {log}:\n.*\nno such model"):
        asyncio.run(server(log, "crash").start(30))


def test_a_server_that_does_not_answer_in_time_is_given_up(tmp_path: Path) -> None:
    async def run() -> None:
        made = server(tmp_path / "engine.log", "silent")
        with pytest.raises(TimeoutError, match=r"(?s)no answer within 1 s .*silent on 127.0.0.1"):
            await made.start(1)
        await made.stop()

    asyncio.run(run())


STARTER = """
import asyncio, sys, time
from pathlib import Path
from tests.unit.test_server import ask, server

async def run():
    made = server(Path(sys.argv[1]), sys.argv[2])
    endpoint = await made.start(30)
    print(*ask(endpoint, endpoint.api_key)["pids"], flush=True)
    time.sleep(1000)

asyncio.run(run())
"""


@pytest.mark.parametrize("guard_first", [False, True])
@pytest.mark.parametrize("mode", ["serve", "stubborn"])
def test_no_server_outlives_a_starter_that_was_killed(
    tmp_path: Path, mode: str, guard_first: bool
) -> None:
    starter = subprocess.Popen(
        [sys.executable, "-c", STARTER, str(tmp_path / "engine.log"), mode],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert starter.stdout is not None
    pids = [int(pid) for pid in starter.stdout.readline().split()]
    assert len(pids) == 2
    assert not gone(pids, within=0.2)
    if guard_first:
        for child in psutil.Process(starter.pid).children():
            child.kill()
    starter.kill()
    assert gone(pids, within=guard.GRACE_SECONDS + 5)
    starter.communicate()


def test_the_guard_ends_with_the_status_of_its_command_and_leaves_no_child() -> None:
    code = "import subprocess; print(subprocess.Popen(['sleep', '1000']).pid, flush=True); exit(4)"
    reading, writing = os.pipe()
    ran = subprocess.run(
        [sys.executable, guard.__file__, sys.executable, "-c", code],
        stdin=reading,
        stdout=subprocess.PIPE,
        text=True,
        timeout=20,
    )
    os.close(reading)
    os.close(writing)
    assert ran.returncode == 4
    assert gone([int(ran.stdout)])


def test_an_interface_is_named_by_what_the_machine_has() -> None:
    assert address_of(None) == address_of("lo") == "127.0.0.1"
    with pytest.raises(ValueError, match=r"no IPv4 interface 'eth99'; it has .*lo"):
        address_of("eth99")


def test_servers_that_other_hosts_cannot_reach_are_refused() -> None:
    rollout = schema.Rollout(kind="sglang", gpus=(0,))
    check_reachable(rollout, ["a", "a"])
    with pytest.raises(
        ValueError, match=r"on 2 hosts \(a, b\) do not all reach; set rollout.inter"
    ):
        check_reachable(rollout, ["a", "a", "b"])
    check_reachable(rollout.model_copy(update={"interface": "ib0"}), ["a", "b"])
    with pytest.raises(ValueError, match="sglang servers on 2 nodes listen on loopback"):
        check_reachable(rollout.model_copy(update={"nodes": 2, "engines": 2}), ["a"])
