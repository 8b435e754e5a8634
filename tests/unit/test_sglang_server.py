"""What an SGLang server of ours does that SGLang does not."""

from __future__ import annotations

import asyncio
import importlib
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

PACKAGE = "prism_megatron.rollout.sglang_server."
MODEL = PACKAGE + "models.qwen3_vl_moe"


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
    monkeypatch.setitem(sys.modules, MODEL, ModuleType(MODEL))
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: done.append("waited"))
    for name in ("memory", "models"):
        monkeypatch.delitem(sys.modules, PACKAGE + name, raising=False)
    importlib.import_module(PACKAGE + "models")
    # bound to the saver of this test
    for name in ("memory", "models"):
        del sys.modules[PACKAGE + name]
    TorchMemorySaver().pause(tag="kv_cache")
    TorchMemorySaver().pause("weights")
    assert done == ["waited", "kv_cache", "waited", "weights"]


def test_a_server_does_not_start_without_our_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang would take its own, which knows none of the names that experts are sent under."""
    memory = ModuleType(PACKAGE + "memory")
    vars(memory).update(wait_before_pause=lambda: None)
    monkeypatch.setitem(sys.modules, memory.__name__, memory)
    # as if this SGLang had no such module
    monkeypatch.setitem(sys.modules, "sglang.srt.models", None)
    for name in (PACKAGE + "models", MODEL):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(ImportError, match="sglang"):
        importlib.import_module(PACKAGE + "models")


def test_a_request_that_was_cut_off_in_the_queue_is_forgotten_once_it_is_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answered: list[str] = []

    class TokenizerManager:
        def __init__(self) -> None:
            self.rid_to_state = {"one": "its images", "other": "runs"}

        def _handle_abort_req(self, request: SimpleNamespace) -> None:
            answered.append(self.rid_to_state[request.rid])

    module = ModuleType("sglang.srt.managers.tokenizer_manager")
    vars(module).update(TokenizerManager=TokenizerManager)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    requests = importlib.import_module(PACKAGE + "requests")
    del sys.modules[requests.__name__]
    monkeypatch.setattr(requests, "KEPT_SECONDS", 0.05)
    requests.forget_what_is_cut_off()

    async def run() -> None:
        manager = TokenizerManager()
        manager._handle_abort_req(SimpleNamespace(rid="one"))
        # who waits for the answer finds it still
        assert set(manager.rid_to_state) == {"one", "other"}
        await asyncio.sleep(0.2)
        assert set(manager.rid_to_state) == {"other"}

    asyncio.run(run())
    assert answered == ["its images"]
