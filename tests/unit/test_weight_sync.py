"""The weight sync checks the version that the engine answers with, and what a server is asked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import httpx
import pytest
import torch
from torch import Tensor

from prism_megatron.config.schema import Sampling
from prism_megatron.rollout.engine import LOAD_SECONDS
from prism_megatron.rollout.http_engine import CONTROL_SECONDS
from prism_megatron.rollout.sglang import SGLangEngine
from prism_megatron.rollout.vllm import VLLMEngine
from prism_megatron.rollout.vocabulary import Vocabulary
from prism_megatron.rollout.weight_sync import InProcessSync
from prism_megatron.types import Prompt, Rollout


class LaggingEngine:
    """An engine whose version is `lag` behind the weights it was given."""

    def __init__(self, lag: int) -> None:
        self.lag = lag
        self.weight_version = -1
        self.weights: dict[str, Tensor] = {}

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, step: int
    ) -> list[list[Rollout]]:
        raise NotImplementedError

    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        self.weights = dict(named_tensors)
        self.weight_version = version - self.lag


def test_sync_streams_the_weights_to_the_engine() -> None:
    engine = LaggingEngine(lag=0)
    weight = torch.arange(3.0)
    InProcessSync(engine).sync(iter([("a", weight)]), version=4)
    assert engine.weights == {"a": weight}
    assert engine.weight_version == 4


def test_an_engine_that_answers_with_another_version_stops_the_run() -> None:
    with pytest.raises(RuntimeError, match=r"version 4 were sent.* answers with version 3"):
        InProcessSync(LaggingEngine(lag=1)).sync([], version=4)


def test_a_server_that_hangs_is_waited_for_a_few_minutes_but_for_weights() -> None:
    vocabulary = Vocabulary(stop=(13,), image=1, forbidden=(1, 2), size=20)
    engine = SGLangEngine("http://localhost", "key", vocabulary)
    waits: dict[str, float] = {}

    def post(path: str, *, json: Any, timeout: float) -> httpx.Response:
        waits[path] = timeout
        return httpx.Response(200, json={}, request=httpx.Request("POST", engine.url))

    with mock.patch.object(engine._blocking, "post", post):
        engine.pause()
        engine.load_disk(Path("/weights"), 1)
        engine.resume()
    assert waits["/pause_generation"] == waits["/continue_generation"] == CONTROL_SECONDS
    assert CONTROL_SECONDS < waits["/update_weights_from_disk"] == LOAD_SECONDS


def test_vllm_gets_ready_before_new_weights_come() -> None:
    """Its quantised layers would not take them a second time."""
    asked: list[str] = []

    def post(path: str, body: Mapping[str, Any] | None = None, seconds: float = 0) -> Any:
        asked.append((body or {}).get("method", path))
        return {"results": []}

    vocabulary = Vocabulary(stop=(13,), image=1, forbidden=(1, 2), size=20)
    engine = VLLMEngine("http://localhost", "key", vocabulary)
    with mock.patch.object(engine, "post", post):
        engine.pause()
        engine.load_ipc({}, 3)
        engine.resume()
    assert asked[:3] == ["/pause?mode=keep", "begin_load", "load_ipc"] and asked[-1] == "/resume"
