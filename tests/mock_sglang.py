"""A server that speaks the part of SGLang's HTTP protocol that we use, over a LocalEngine.

Weights come as to SGLang: an update names sockets by GPU, each of which hands over memory once and
then lists of what lies where in it (checkpoint-engine's worker.update_weights_from_ipc). They are
loaded when the update ends, fused experts under the names of transformers 5, which has them as they
are sent; of FP8 weights what they stand for.

python -m tests.mock_sglang takes a server's command line, of which it needs --model-path and
--port, and its key from SGLANG_API_KEY.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import groupby
from pathlib import Path
from threading import Event
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from checkpoint_tools.quantize import dequantized
from checkpoint_tools.weights import unequal
from model_providers.fp8_blocks import SCALE
from prism_megatron.config.schema import Sampling
from prism_megatron.rollout import fused_experts, ipc_load, outer_group, pixels
from prism_megatron.rollout.local import LocalEngine
from prism_megatron.types import Prompt, VisualInputs

KEY = "secret"
PLACEHOLDERS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")


class MockSGLang:
    """The server's state: requests seen, weights, what to get wrong."""

    def __init__(self, hf_dir: Path) -> None:
        self.engine = LocalEngine(hf_dir, seed=5, pretrained=False)
        config = json.loads((hf_dir / "config.json").read_text())
        self.image = config["image_token_id"]
        self.placeholders = {config[name] for name in PLACEHOLDERS}
        self.version, self.paused = -1, False
        self.stops: list[Event] = []
        self.paths: list[str] = []
        self.woken: list[list[str]] = []
        self.loaded: dict[str, Tensor] = {}
        self.seen: list[list[int]] = []
        """Prompts since the last load, with an image's name in place of its tokens."""
        self.received: dict[str, Tensor] = {}
        self.groups: dict[str, dist.ProcessGroup] = {}
        self.busy = False
        """Whether requests wait in the queue until they are cut off."""
        self.refuse = ""
        """A path that is answered with status 400."""
        self.forget_version = False

    def answer(self, path: str, body: Any) -> tuple[int, Any] | tuple[int, Any, dict[str, str]]:
        """Status and JSON."""
        self.paths.append(path)
        if path == self.refuse:
            return 400, {"success": False, "message": "told to refuse"}
        if path == "/generate":
            try:
                return 200, self._generate(body)
            except ValueError as error:
                return 400, {"error": {"message": str(error)}}
        if path == "/weights_checker":
            try:
                self.engine.weight_check.run(body["action"])
            except RuntimeError as error:
                return 400, {"success": False, "message": str(error)}
        if path == "/abort_request":
            for stop in self.stops:
                stop.set()
        if path == "/model_info":
            return 200, {"weight_version": str(self.version)}
        if path == "/pause_generation":
            self.paused = True
        if path == "/resume_memory_occupation":
            self.woken.append(body["tags"])
        if path == "/continue_generation":
            self.paused = False
        if path == "/update_weights_from_ipc":
            # one engine rank a GPU, all at once
            with ThreadPoolExecutor() as pool:
                updates = list(pool.map(self._update, body["zmq_handles"].values()))
            for name, tensor in updates[0].items():
                assert not any(unequal(tensor, update[name]) for update in updates)
            self.load(_named(updates[0]), int(body["weight_version"]))
        if path == "/init_weights_update_group":
            self.groups[body["group_name"]] = outer_group.join(
                body["master_address"],
                body["master_port"],
                body["world_size"],
                body["rank_offset"],
                body["group_name"],
                body["backend"],
            )
        if path == "/destroy_weights_update_group":
            if body["group_name"] not in self.groups:
                return 400, {
                    "success": False,
                    "message": "The group to be destroyed does not exist",
                }
            dist.destroy_process_group(self.groups.pop(body["group_name"]))
        if path == "/update_weights_from_distributed":
            for name, dtype, shape in zip(
                body["names"], body["dtypes"], body["shapes"], strict=True
            ):
                self.received[name] = torch.empty(shape, dtype=getattr(torch, dtype))
                group = self.groups[body["group_name"]]
                outer_group.broadcast(self.received[name], group).wait()
            if body["weight_version"] is not None:
                self.load(_named(self.received), int(body["weight_version"]))
        if path == "/update_weights_from_disk":
            if body["load_format"] != "auto":
                return 400, {"success": False, "message": "Failed to get model loader"}
            weights = load_file(Path(body["model_path"]) / "model.safetensors")
            self.load(weights, int(body["weight_version"]))
        return 200, {"success": True, "message": "done"}

    def load(self, weights: dict[str, Tensor], version: int) -> None:
        """Take the weights, all at once."""
        self.loaded, self.seen = weights, []
        self.engine.load_weights(self._plain(weights).items(), version)
        if not self.forget_version:
            self.version = version

    def _plain(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """FP8 projections as what they stand for."""
        plain = dict(weights)
        for name in weights:
            if name + SCALE in weights:
                plain[name] = dequantized(weights, name)
                del plain[name + SCALE]
        return plain

    def _update(self, handle: str) -> dict[str, Tensor]:
        loaded: dict[str, Tensor] = {}

        def take(tensors: list[tuple[str, Tensor]]) -> None:
            for name, tensor in tensors:
                assert name not in loaded
                loaded[name] = tensor.clone()

        ipc_load.receive(handle, torch.device("cpu"), take, lambda: None)
        return loaded

    def _generate(self, body: Any) -> Any:
        given = body["sampling_params"]
        sampling = Sampling(
            n=given["n"],
            max_new_tokens=given["max_new_tokens"],
            temperature=given["temperature"],
            top_p=given["top_p"],
        )
        prompt = prompt_of(body)
        assert {int(token) for token in given["logit_bias"]} == self.placeholders
        stop = Event()
        self.stops.append(stop)
        if self.busy:
            stop.wait()
            return [self._cut_off_in_the_queue() for _ in range(sampling.n)]
        [group] = self.engine.sample([prompt], sampling, ["key"], stop)
        cached = self._cached(prompt)
        # as SGLang, which reads the prompt of several samples once before them
        cached = self._cached(prompt) if sampling.n > 1 else cached
        answers = [
            {
                "meta_info": {
                    "cached_tokens": cached,
                    "prompt_tokens": len(prompt.input_ids),
                    "output_token_logprobs": [
                        [logprob, token, None]
                        for token, logprob in zip(rollout.ids, rollout.logprobs, strict=True)
                    ],
                    "finish_reason": {"type": rollout.finish_reason},
                    "weight_version": str(rollout.weight_version),
                }
            }
            for rollout in group
        ]
        return answers if sampling.n > 1 else answers[0]

    def _cut_off_in_the_queue(self) -> Any:
        """As TokenizerManager._handle_abort_req answers."""
        return {
            "meta_info": {
                "finish_reason": {"type": "abort", "message": "Abort in waiting queue"},
                "weight_version": str(self.version),
                "output_token_logprobs": [],
                "completion_tokens": 0,
            }
        }

    def _cached(self, prompt: Prompt) -> int:
        """Tokens of a prompt, not all of which are ever taken from the cache, that begin an earlier
        one too."""
        named, images = [], iter(prompt.images)
        for token, run in groupby(prompt.input_ids):
            name = int(next(images).key) if token == self.image else token
            named += [name] * len(list(run))
        begins = [_common(named, old) for old in self.seen]
        self.seen.append(named)
        return min(max(begins, default=0), len(named) - 1)


def _named(sent: dict[str, Tensor]) -> dict[str, Tensor]:
    """By Hugging Face names; parts of fused experts, which come in their order, as one."""
    parts: dict[str, list[Tensor]] = {}
    for name, tensor in sent.items():
        assert fused_experts.sent_name(name) == name, f"an engine would turn {name}"
        before = parts.setdefault(fused_experts.hf_name(name), [])
        first = sum(map(len, before))
        assert "[" not in name or name.endswith(f"[{first}:{first + len(tensor)}]"), name
        before.append(tensor)
    return {name: torch.cat(found) for name, found in parts.items()}


def _common(a: list[int], b: list[int]) -> int:
    """How many entries they begin with alike."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))


def prompt_of(body: Any) -> Prompt:
    """What a request to /generate shows the engine."""
    shown = body.get("image_data", [])
    if body["sampling_params"]["n"] > 1 and shown:
        [shown] = shown
    return Prompt("row", tuple(body["input_ids"]), tuple(map(_image, shown)))


def _image(item: Any) -> VisualInputs:
    assert item["format"] == "prism_megatron" and 0 <= item["hash"] < 2**63
    t, h, w = item["grid_thw"]
    values = pixels.decode(item["pixels"], t * h * w)
    return VisualInputs(str(item["hash"]), values.float(), (t, h, w))


@contextmanager
def serve(
    mock: MockSGLang, port: int = 0, key: str = KEY, host: str = "127.0.0.1"
) -> Iterator[str]:
    """The mock for as long as the block lasts; its URL."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._respond(None)

        def do_POST(self) -> None:
            self._respond(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def _respond(self, body: Any) -> None:
            status, content, more = 401, {"error": "Unauthorized"}, {}
            if self.headers.get("Authorization") == f"Bearer {key}":
                status, content, more, *_ = (*mock.answer(self.path, body), {})
            data = json.dumps(content).encode()
            self.send_response(status)
            for name in more.keys() - {"content-type", "content-length"}:
                self.send_header(name, more[name])
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer((host, port), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://{host}:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def python(file: Path) -> Path:
    """Write a "python" that starts the mock where it is asked for a module, as for SGLang's."""
    root = Path(__file__).parents[1]
    start = f"PYTHONPATH={root} exec {sys.executable} -m tests.mock_sglang"
    file.write_text(f'#!/bin/sh\nshift 2\n{start} "$@"\n')
    file.chmod(0o755)
    return file


def main() -> None:
    """Serve until the process is ended."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model-path", type=Path)
    parser.add_argument("--host")
    parser.add_argument("--port", type=int)
    options, _ = parser.parse_known_args()
    torch.set_num_threads(1)
    mock, key = MockSGLang(options.model_path), os.environ["SGLANG_API_KEY"]
    with serve(mock, options.port, key, options.host):
        threading.Event().wait()


if __name__ == "__main__":
    main()
