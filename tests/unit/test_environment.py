from __future__ import annotations

import socket
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from packaging.version import Version

from prism_megatron import environment
from prism_megatron.environment import GIB, Finding, Room

TESTED = {"torch": "2.11.0+cu130", "transformers": "5.6.0", "megatron-core": "0.19.2"}
INTERFACES = {"lo": ["127.0.0.1"], "eth0": ["10.0.0.5"], "ib0": ["10.1.0.5"]}
PLENTY = Room(memory=2000 * GIB, shm=900 * GIB, shm_total=900 * GIB, disk=9000 * GIB)


def problems(installed: dict[str, str], apex_files: tuple[str, ...] = ()) -> list[str]:
    versions = {name: Version(version) for name, version in (TESTED | installed).items()}
    return list(environment.known_bad(versions, apex_files))


@pytest.mark.parametrize(
    ("installed", "said"),
    [
        ({"transformer-engine": "2.13.0"}, "install transformer-engine 2.12.0"),
        ({"transformer-engine": "2.14.1"}, "Transformer Engine 2.14.1 needs a newer cuBLAS"),
        ({"kernels": "0.17.0"}, "install kernels 0.14.1"),
        ({"transformers": "4.57.6"}, "rope_theta ten times off"),
        ({"apex": "0.9.10.dev0"}, "not NVIDIA Apex"),
    ],
)
def test_a_known_bad_version_is_named_with_the_way_out(
    installed: dict[str, str], said: str
) -> None:
    [problem] = problems(installed)
    assert said in problem


@pytest.mark.parametrize(
    "installed",
    [
        {},
        {"transformer-engine": "2.12.0", "kernels": "0.14.1"},
        {"transformer-engine": "2.13.0", "torch": "2.12.0"},
        {"kernels": "0.17.0", "transformers": "5.7.0"},
    ],
)
def test_good_versions_have_no_problem(installed: dict[str, str]) -> None:
    assert problems(installed) == []


def test_nvidias_apex_is_known_by_its_files() -> None:
    assert problems({"apex": "0.1"}, apex_files=("apex/optimizers/fused_adam.py",)) == []


def said(findings: Iterable[Finding]) -> list[tuple[str, str]]:
    """Severity and first word of each."""
    return [(finding.severity, finding.what.split()[0]) for finding in findings]


@pytest.mark.parametrize(
    ("variables", "hosts", "found"),
    [
        ({}, 1, []),
        ({"NCCL_SOCKET_IFNAME": "eth,ib", "GLOO_SOCKET_IFNAME": "ib0"}, 2, []),
        ({"NCCL_SOCKET_IFNAME": "=ib0", "GLOO_SOCKET_IFNAME": "eth0,ib0"}, 2, []),
        ({"NCCL_SOCKET_IFNAME": "^docker", "GLOO_SOCKET_IFNAME": "eth0"}, 2, []),
        ({"GLOO_SOCKET_IFNAME": "eth"}, 1, [("bad", "GLOO_SOCKET_IFNAME=eth")]),
        ({"NCCL_SOCKET_IFNAME": "=eth"}, 1, [("bad", "NCCL_SOCKET_IFNAME==eth")]),
        ({"NCCL_SOCKET_IFNAME": "ens"}, 1, [("bad", "NCCL_SOCKET_IFNAME=ens")]),
        ({"GLOO_SOCKET_IFNAME": "lo"}, 1, []),
        (
            {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "ib0"},
            2,
            [("bad", "GLOO_SOCKET_IFNAME=lo")],
        ),
        ({"GLOO_SOCKET_IFNAME": "ib0"}, 2, [("note", "NCCL_SOCKET_IFNAME")]),
        ({}, 2, [("note", "GLOO_SOCKET_IFNAME")]),
        ({"NCCL_IB_DISABLE": "1", "NCCL_IB_HCA": "mlx5"}, 1, [("bad", "NCCL_IB_DISABLE=1")]),
        ({"NCCL_IB_DISABLE": "0", "NCCL_IB_HCA": "mlx5"}, 1, []),
        ({"NCCL_IB_DISABLE": "1", "NCCL_NET": "IB"}, 1, [("bad", "NCCL_IB_DISABLE=1")]),
        (
            {"NCCL_P2P_DISABLE": "1", "NCCL_P2P_LEVEL": "NVL"},
            1,
            [("bad", "NCCL_P2P_DISABLE=1"), ("note", "NCCL_P2P_DISABLE=1:")],
        ),
        (
            {"NCCL_MIN_NCHANNELS": "16", "NCCL_MAX_NCHANNELS": "8"},
            1,
            [("bad", "NCCL_MIN_NCHANNELS=16")],
        ),
        (
            {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0"},
            1,
            [("bad", "TORCH_NCCL_ASYNC_ERROR_HANDLING=0")],
        ),
        ({"NCCL_IB_TIMEOUT": "80"}, 1, [("note", "NCCL_IB_TIMEOUT=80")]),
        ({"NCCL_IB_TIMEOUT": "22"}, 1, []),
        ({"CUDA_LAUNCH_BLOCKING": "1"}, 1, [("note", "CUDA_LAUNCH_BLOCKING=1:")]),
    ],
)
def test_settings_that_contradict_or_harm_are_found(
    variables: dict[str, str], hosts: int, found: list[tuple[str, str]]
) -> None:
    assert said(environment.settings(variables, INTERFACES, "10.0.0.5", hosts)) == found


@pytest.mark.parametrize("address", ["127.0.1.1", None])
def test_a_name_that_leads_to_loopback_is_bad_between_hosts(address: str | None) -> None:
    one = {"lo": ["127.0.0.1"], "eth0": ["10.0.0.5"]}
    [finding] = environment.settings({}, one, address, 2)
    assert finding.severity == "bad" and "set GLOO_SOCKET_IFNAME" in finding.what
    assert not list(environment.settings({}, one, address, 1))
    assert not list(environment.settings({"GLOO_SOCKET_IFNAME": "eth0"}, one, address, 2))


@pytest.mark.parametrize(
    ("less", "devices", "found"),
    [
        ({}, 8, []),
        ({"memory": GIB // 2}, 0, [("bad", "0.50")]),
        ({"memory": 100 * GIB}, 8, [("note", "100")]),
        ({"memory": 100 * GIB}, 0, []),
        # docker's default
        ({"shm": GIB // 16, "shm_total": GIB // 16}, 8, [("bad", "/dev/shm")]),
        ({"shm": GIB // 16, "shm_total": GIB // 16}, 0, [("note", "0.06")]),
        ({"disk": GIB // 4}, 0, [("bad", "0.25")]),
        ({"disk": 50 * GIB}, 8, [("note", "50")]),
        ({"disk": 50 * GIB}, 0, []),
    ],
)
def test_too_little_room_is_found(
    less: dict[str, int], devices: int, found: list[tuple[str, str]]
) -> None:
    room = Room(**(PLENTY.__dict__ | less))
    assert said(environment.space(room, devices)) == found


def test_room_is_looked_for_where_a_folder_would_be(tmp_path: Path) -> None:
    room = environment.room_for(tmp_path / "not" / "there")
    assert room.disk > 0 and room.memory > 0 and room.shm_total >= room.shm


def test_a_containers_limit_counts_without_the_page_cache(tmp_path: Path) -> None:
    for name, text in (
        ("memory.max", "1000\n"),
        ("memory.current", "900\n"),
        ("memory.stat", "anon 300\nfile 550\nshmem 50\n"),
    ):
        (tmp_path / name).write_text(text)
    assert environment._container_memory(tmp_path) == 600
    (tmp_path / "memory.max").write_text("max\n")
    assert environment._container_memory(tmp_path) == float("inf")
    assert environment._container_memory(tmp_path / "none") == float("inf")


def test_gpus_that_others_use_are_found() -> None:
    found = said(environment.gpus({0: (140, 141), 1: (100, 141), 2: (20, 141)}))
    assert found == [("note", "GPU"), ("bad", "GPU")]


def test_ports_in_use_are_found() -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        [finding] = environment.ports(port, 1, named=True)
        assert finding.severity == "bad" and f"ports {port} are in use" in finding.what
        [finding] = environment.ports(port, 1, named=False)
        assert finding.severity == "note"
    assert not list(environment.ports(port, 1, named=True))


@pytest.mark.parametrize(
    ("variables", "hosts"),
    [
        ({}, 1),
        ({"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8"}, 1),
        ({"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8", "MASTER_ADDR": "node-a"}, 2),
        ({"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8", "MASTER_ADDR": "127.0.0.1"}, 1),
        ({"WORLD_SIZE": "4"}, 1),
    ],
)
def test_hosts_follow_from_what_the_launcher_says(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], hosts: int
) -> None:
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert environment.hosts() == hosts


def test_a_host_that_is_not_fit_is_refused_once_and_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu = torch.device("cpu")
    environment.check_host(tmp_path, cpu)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no0")
    monkeypatch.setenv("NCCL_IB_DISABLE", "1")
    monkeypatch.setenv("NCCL_NET", "IB")
    with pytest.raises(ValueError, match="is not fit for a run:\n- GLOO.*\n- NCCL_IB_DISABLE=1"):
        environment.check_host(tmp_path, cpu)
    # the first rank of the host has said it
    monkeypatch.setenv("LOCAL_RANK", "1")
    environment.check_host(tmp_path, cpu)
