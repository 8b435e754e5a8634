"""The client of a vLLM server and what stands in front of that server, over its own protocol."""

from __future__ import annotations

import asyncio
import importlib
import json
import socket
import sys
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import httpx
import pytest
import torch
from torch.distributed import distributed_c10d

from prism_megatron.config.schema import Sampling
from prism_megatron.rollout.vllm import VLLMEngine, request
from prism_megatron.rollout.vllm_front import Front
from prism_megatron.rollout.vocabulary import Vocabulary
from prism_megatron.types import Prompt, Rollout, VisualInputs

VOCABULARY = Vocabulary(stop=(13,), image=1, forbidden=(1, 2), size=20)
PROMPT = Prompt("row", (5, 6, 7), ())


class Server:
    """What is behind the front: vLLM 0.22.1's answers (entrypoints/serve/disagg/protocol.py), and
    its workers, which a call of a method may give other weights."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, workers: int = 1) -> None:
        monkeypatch.setenv("VLLM_API_KEY", "key")
        self.versions, self.asked, self.reached = [3] * workers, 0, []
        self.finish_reason, self.ids, self.meanwhile = "stop", [11, 13], lambda: None
        self.refusal: Exception | None = None
        self.client = SimpleNamespace(collective_rpc=self.collective_rpc)
        self.front = Front(self.endpoints)
        self.engine = VLLMEngine("http://vllm", "key", VOCABULARY)

    async def collective_rpc(self, method: str) -> Any:
        assert method == "loaded_version"
        self.asked += 1
        found = [[version] for version in self.versions]
        # the engine answers after others have had their turn
        await asyncio.sleep(0)
        return found

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        scope["app"] = SimpleNamespace(state=SimpleNamespace(engine_client=self.client))
        await self.front(scope, receive, send)

    async def endpoints(self, scope: Any, receive: Any, send: Any) -> None:
        self.reached.append(scope["path"])
        body = json.loads((await receive())["body"] or b"{}")
        answer: Any = {}
        if scope["path"] == "/inference/v1/generate":
            if self.refusal is not None:
                raise self.refusal
            answer = self.generate(body)
            self.meanwhile()
        if scope["path"] == "/collective_rpc":
            self.versions = [body["kwargs"]["version"]] * len(self.versions)
        data = json.dumps(answer).encode()
        header = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": 200, "headers": header})
        await send({"type": "http.response.body", "body": data})

    def generate(self, body: Any) -> Any:
        """Without usage, which vLLM computes and its model of an answer has no field for."""
        logprobs = [
            {"token": f"token_id:{i}", "logprob": -0.5, "bytes": None, "top_logprobs": []}
            for i in self.ids
        ]
        choices = [
            {
                "index": i,
                "logprobs": {"content": logprobs},
                "finish_reason": self.finish_reason,
                "token_ids": self.ids,
                "routed_experts": None,
            }
            for i in range(body["sampling_params"]["n"])
        ]
        return {
            "request_id": "x",
            "choices": choices,
            "prompt_logprobs": None,
            "kv_transfer_params": None,
        }

    def http(self, key: str = "key") -> httpx.AsyncClient:
        return httpx.AsyncClient(
            transport=httpx.ASGITransport(self.app),
            base_url="http://vllm",
            headers={"Authorization": f"Bearer {key}"},
        )

    async def sample(self, prompts: int = 1) -> list[list[Rollout]]:
        self.engine._asynchronous = self.http()
        sampling = Sampling(n=2, max_new_tokens=4)
        asked = [self.engine.generate(PROMPT, sampling, "") for _ in range(prompts)]
        try:
            return list(await asyncio.gather(*asked))
        finally:
            await self.engine.close()


def test_an_answer_becomes_rollouts(monkeypatch: pytest.MonkeyPatch) -> None:
    [group] = asyncio.run(Server(monkeypatch).sample())
    assert group == [Rollout((11, 13), (-0.5, -0.5), "stop", 3)] * 2
    # which vLLM does not tell
    assert [rollout.cached for rollout in group] == [None] * 2


def test_workers_are_asked_for_their_version_only_when_it_may_be_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = Server(monkeypatch, workers=2)

    async def run() -> list[int]:
        found = [group[0].weight_version for group in await server.sample(5)]
        found += [group[0].weight_version for group in await server.sample(5)]
        assert server.asked == 1, "each question stops the engine"
        async with server.http() as client:
            await client.post("/collective_rpc", json={"kwargs": {"version": 4}})
        return found + [group[0].weight_version for group in await server.sample(5)]

    assert asyncio.run(run()) == [3] * 10 + [4] * 5
    assert server.asked == 2


def test_what_was_asked_before_a_load_ended_is_not_remembered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = Server(monkeypatch)

    async def run() -> list[list[Rollout]]:
        scope = {"app": SimpleNamespace(state=SimpleNamespace(engine_client=server.client))}
        asked = asyncio.create_task(server.front._weight_version(scope))
        await asyncio.sleep(0)
        server.front._change()
        server.versions = [4]
        assert await asked == 3
        return await server.sample()

    assert asyncio.run(run())[0][0].weight_version == 4


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("versions", r"versions \[3, 4\]"),
        ("meanwhile", "version 3 to 4"),
        ("front", "version none"),
        ("error", "failed after 2 tokens"),
    ],
)
def test_answers_that_must_not_be_trained_on_are_refused(
    monkeypatch: pytest.MonkeyPatch, wrong: str, words: str
) -> None:
    server = Server(monkeypatch, workers=2)

    def load() -> None:
        server.front._change()
        server.versions = [4, 4]

    if wrong == "versions":
        server.versions = [4, 3]
    elif wrong == "meanwhile":
        server.meanwhile = load
    elif wrong == "front":
        server.front = server.endpoints  # type: ignore[assignment]
    else:
        server.finish_reason = "error"
    with pytest.raises(RuntimeError, match=words):
        asyncio.run(server.sample())


def test_nothing_is_answered_without_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM itself asks for it at /v1 and /inference, not where weights are loaded."""
    server = Server(monkeypatch)
    paths = ("/inference/v1/generate", "/collective_rpc", "/pause", "/sleep", "/server_info")

    async def statuses(key: str) -> list[int]:
        async with server.http(key) as client:
            body: dict[str, Any] = {"kwargs": {"version": 3}, "sampling_params": {"n": 1}}
            return [(await client.post(path, json=body)).status_code for path in paths]

    assert asyncio.run(statuses("other")) == [401] * len(paths) and server.reached == []
    assert asyncio.run(statuses("key")) == [200] * len(paths)


def test_a_prompt_that_the_engine_refuses_costs_no_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """vLLM raises, its server answers and closes what the next prompt may be on."""
    server = Server(monkeypatch)
    server.refusal = ValueError("longer than the maximum model length")
    with pytest.raises(ValueError, match=r"row row: .*longer than the maximum"):
        asyncio.run(server.sample())
    server.refusal = RuntimeError("the engine died")
    with pytest.raises(RuntimeError, match="the engine died"):
        asyncio.run(server.sample())


def test_each_image_has_its_tokens() -> None:
    image = VisualInputs("a", torch.zeros(16, 1536), (1, 4, 4))
    sampling = Sampling(n=2, max_new_tokens=4)
    body = request(Prompt("row", (5, 1, 1, 1, 1, 6), (image,)), sampling, VOCABULARY)
    assert body["features"]["mm_placeholders"] == {"image": [{"offset": 1, "length": 4}]}
    with pytest.raises(ValueError, match="row row: 2 runs of image tokens and 1 images"):
        request(Prompt("row", (5, 1, 1, 1, 1, 6, 1), (image,)), sampling, VOCABULARY)


def test_what_was_cut_off_before_its_prompt_was_read_has_no_experts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = Server(monkeypatch)
    server.engine.routes, server.ids, server.finish_reason = True, [], "abort"
    [group] = asyncio.run(server.sample())
    assert group == [Rollout((), (), "abort", 3)] * 2


def test_a_worker_leaves_its_group_before_it_joins_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when nobody could ask it to."""
    loader = "vllm.model_executor.model_loader"
    for name in ("vllm", "vllm.config", f"{loader}.reload", f"{loader}.utils"):
        monkeypatch.setitem(sys.modules, name, MagicMock())
    module = importlib.import_module("prism_megatron.rollout.vllm_server")
    monkeypatch.delitem(sys.modules, module.__name__)
    worker, known = module.WeightExtension(), len(distributed_c10d._world.pg_map)
    worker.rank = 0
    for number in range(3):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        worker.join_group("127.0.0.1", port, 0, 1, f"group_{number}", "gloo")
        assert len(distributed_c10d._world.pg_map) == known + 1
    for _ in range(2):
        worker.leave_group()
        assert len(distributed_c10d._world.pg_map) == known
