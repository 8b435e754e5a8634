"""What an SGLang server of ours does before its memory goes."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import pytest
import torch

PACKAGE = "prism_megatron.rollout.sglang_server."


def test_a_server_waits_for_the_device_before_memory_is_taken_from_under_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done: list[str] = []

    class TorchMemorySaver:
        def pause(self, tag: str) -> None:
            done.append(tag)

    saver = ModuleType("torch_memory_saver.entrypoint")
    vars(saver).update(TorchMemorySaver=TorchMemorySaver)
    monkeypatch.setitem(sys.modules, saver.__name__, saver)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("waited"))
    for name in ("memory", "models"):
        monkeypatch.delitem(sys.modules, PACKAGE + name, raising=False)
    importlib.import_module(PACKAGE + "models")
    # bound to the saver of this test
    for name in ("memory", "models"):
        del sys.modules[PACKAGE + name]
    TorchMemorySaver().pause(tag="kv_cache")
    TorchMemorySaver().pause("weights")
    assert done == ["waited", "kv_cache", "waited", "weights"]
