"""A server that speaks the part of vLLM's HTTP protocol that we use to sample, over a LocalEngine.

Requests pass through what we put in front of vLLM's own server; answers have the fields of its
GenerateResponse (0.22.1, entrypoints/serve/disagg/protocol.py).
"""

from __future__ import annotations

import asyncio
import base64
import json
import threading
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any
from unittest import mock

import msgpack
import torch

from prism_megatron.config.schema import Sampling
from prism_megatron.rollout.vllm_front import Front
from prism_megatron.types import Prompt, Rollout, VisualInputs
from tests.mock_sglang import KEY, MockSGLang


class MockVLLM(MockSGLang):
    """See the top of this file; `load` gives its one worker weights."""

    def __init__(self, hf_dir: Path) -> None:
        super().__init__(hf_dir)
        with mock.patch.dict("os.environ", VLLM_API_KEY=KEY):
            self.front = Front(self._endpoints)
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()

    def answer(self, path: str, body: Any) -> tuple[int, Any, dict[str, str]]:
        """Status, JSON and headers."""
        self.paths.append(path)
        asked = self._through_the_front(path.partition("?")[0], path.partition("?")[2], body)
        return asyncio.run_coroutine_threadsafe(asked, self._loop).result()

    async def collective_rpc(self, method: str) -> list[Any]:
        """What vLLM's engine client has every worker do."""
        assert method == "loaded_version"
        return [[self.version]]

    async def _through_the_front(
        self, path: str, query: str, body: Any
    ) -> tuple[int, Any, dict[str, str]]:
        sent: list[Any] = []

        async def receive() -> Any:
            return {"type": "http.request", "body": json.dumps(body).encode()}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {
            "type": "http",
            "path": path,
            "query_string": query.encode(),
            "headers": [(b"authorization", f"Bearer {KEY}".encode())],
            "app": SimpleNamespace(state=SimpleNamespace(engine_client=self)),
        }
        await self.front(scope, receive, send)
        start, content = sent
        headers = {key.decode(): value.decode() for key, value in start["headers"]}
        return start["status"], json.loads(content["body"]), headers

    async def _endpoints(self, scope: Any, receive: Any, send: Any) -> None:
        body = json.loads((await receive())["body"])
        answer: Any = {}
        if scope["path"] == "/inference/v1/generate":
            answer = await asyncio.to_thread(self._sampled, body)
        if scope["path"] == "/collective_rpc":
            answer = {"results": await self.collective_rpc(body["method"])}
        if scope["path"] == "/pause" and b"mode=abort" in scope["query_string"]:
            for stop in self.stops:
                stop.set()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": json.dumps(answer).encode()})

    def _sampled(self, body: Any) -> Any:
        given, stop = body["sampling_params"], Event()
        assert {int(token) for token in given["logit_bias"]} == self.placeholders
        sampling = Sampling(
            n=given["n"],
            max_new_tokens=given["max_tokens"],
            temperature=given["temperature"],
            top_p=given["top_p"],
        )
        self.stops.append(stop)
        [group] = self.engine.sample([vllm_prompt_of(body)], sampling, ["key"], stop)
        return {
            "request_id": "generate-tokens",
            "choices": [_choice(number, rollout) for number, rollout in enumerate(group)],
            "prompt_logprobs": None,
            "kv_transfer_params": None,
        }


def _choice(number: int, rollout: Rollout) -> dict[str, Any]:
    content = [
        {"token": f"token_id:{token}", "logprob": logprob, "bytes": None, "top_logprobs": []}
        for token, logprob in zip(rollout.ids, rollout.logprobs, strict=True)
    ]
    return {
        "index": number,
        "logprobs": {"content": content},
        "finish_reason": rollout.finish_reason,
        "token_ids": list(rollout.ids),
        "routed_experts": None,
    }


def vllm_prompt_of(body: Any) -> Prompt:
    """What a request to /inference/v1/generate shows the engine."""
    features = body.get("features", {"kwargs_data": {"image": []}, "mm_hashes": {"image": []}})
    shown = zip(features["mm_hashes"]["image"], features["kwargs_data"]["image"], strict=True)
    return Prompt("row", tuple(body["token_ids"]), tuple(_image(*image) for image in shown))


def _image(key: str, encoded: str) -> VisualInputs:
    """As vLLM's MsgpackDecoder reads it (vllm/v1/serial_utils.py)."""
    message = msgpack.unpackb(base64.b64decode(encoded))
    (_, shape, patches), (_, [three], grid) = (
        message[name]["data"] for name in ("pixel_values", "image_grid_thw")
    )
    assert three == 3
    values = torch.frombuffer(bytearray(patches.data), dtype=torch.bfloat16).view(shape).float()
    t, h, w = torch.frombuffer(bytearray(grid.data), dtype=torch.int64).tolist()
    return VisualInputs(key, values, (t, h, w))
