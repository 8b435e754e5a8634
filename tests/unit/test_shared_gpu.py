"""Ranks that share GPUs: who gets which, and that NCCL takes each for a host of its own."""

from __future__ import annotations

import os
import runpy
import sys

import pytest

from tests.gpu import shared_gpu


@pytest.mark.parametrize(
    "gpus, ranks, first",
    [("5", 3, "555"), ("2,3", 4, "2233"), ("0,1,4", 4, "0014"), ("0,1,2", 1, "0")],
)
def test_ranks_are_dealt_to_the_gpus_in_their_order(
    monkeypatch: pytest.MonkeyPatch, gpus: str, ranks: int, first: str
) -> None:
    names = ("CUDA_VISIBLE_DEVICES", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NCCL_HOSTID")
    found: list[dict[str, str]] = []

    def run_module(module: str, **_: object) -> None:
        assert (module, sys.argv) == ("some.check", ["some.check", "--out", "FILE"])
        found.append({name: os.environ[name] for name in names})

    monkeypatch.setattr(runpy, "run_module", run_module)
    for rank in range(ranks):
        with monkeypatch.context() as patch:
            patch.setattr(os, "environ", dict(os.environ))
            patch.setattr(sys, "argv", ["shared_gpu", "some.check", "--out", "FILE"])
            os.environ |= {"CUDA_VISIBLE_DEVICES": gpus, "RANK": str(7 + rank)}
            os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks)}
            shared_gpu.main()
    # the first that a rank sees is its own
    assert "".join(each["CUDA_VISIBLE_DEVICES"][0] for each in found) == first
    assert {"".join(sorted(each["CUDA_VISIBLE_DEVICES"])) for each in found} == {
        "".join(sorted(gpus))
    }
    assert {(each["LOCAL_RANK"], each["LOCAL_WORLD_SIZE"]) for each in found} == {("0", "1")}
    assert len({each["NCCL_HOSTID"] for each in found}) == ranks
