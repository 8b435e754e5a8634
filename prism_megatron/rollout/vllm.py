"""One vLLM server, over HTTP: sampling from the trainer's own ids and pixels, and its control.

Prompt: ids, patches --/inference/v1/generate, which takes both as they are--> engine
ids, log-probabilities, finish reason <--'
weight version <-- rollout/vllm_front in the server, which asks the workers
"""

from __future__ import annotations

import asyncio
import base64
import io
import sys
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import torch

from prism_megatron.config.schema import Sampling
from prism_megatron.rollout.engine import LOAD_SECONDS, Part
from prism_megatron.rollout.http_engine import NEVER, HttpEngine, small_routes
from prism_megatron.rollout.pixels import bf16
from prism_megatron.rollout.vllm_front import VERSION
from prism_megatron.rollout.vocabulary import Vocabulary
from prism_megatron.rollout.weight_check import Action
from prism_megatron.types import Prompt, Rollout, VisualInputs

_RAW = 3
"""vLLM's code for plain bytes in its messages (vllm/v1/serial_utils.py)."""
_FINAL_ONLY = 2
"""RequestOutputKind: all samples of a prompt in one answer, and not those that ended last
(vllm/v1/engine/parallel_sampling.py)."""


def server_command(
    hf_dir: Path,
    *,
    host: str,
    port: int,
    api_key: str,
    tensor: int = 1,
    python: str = sys.executable,
    routes: bool = False,
    options: Sequence[str] = (),
) -> tuple[list[str], dict[str, str]]:
    """Command line and additional environment of a server on the visible GPUs.

    python: of the environment that has vLLM, whose transformers is another than the trainer's.
    hf_dir needs no trained weights: they come by a weight sync. routes: it shall tell the
    experts that tokens take. options go to vLLM as they are.
    """
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(hf_dir)]
    command += ["--host", host, "--port", str(port), "--enable-sleep-mode"]
    command += ["--tensor-parallel-size", str(tensor)]
    command += ["--middleware", "prism_megatron.rollout.vllm_front.Front"]
    command += ["--worker-extension-cls", "prism_megatron.rollout.vllm_server.WeightExtension"]
    if routes:
        command.append("--enable-return-routed-experts")
    # a model that is to get other weights anyway
    if not any(Path(hf_dir).glob("*.safetensors")):
        command += ["--load-format", "dummy"]
    environment = {
        # which a command line would show to every user of the host
        "VLLM_API_KEY": api_key,
        # without the endpoints of this mode there is no way to sync weights
        "VLLM_SERVER_DEV_MODE": "1",
        # FP8 blocks as they were sent, not rounded once more to scales that are powers of two
        "VLLM_USE_DEEP_GEMM_E8M0": "0",
    }
    return [*command, *options], environment


class VLLMEngine(HttpEngine):
    """Client of one server; see EngineClient and weight_sync.Server."""

    async def generate(self, prompt: Prompt, sampling: Sampling, key: str) -> list[Rollout]:
        """sampling.n rollouts. Random numbers are the server's own; `key` does not determine them.

        A response that holds an id of no token has finish_reason "invalid".
        """
        # images are preprocessed here, which others need not wait for
        body = await asyncio.to_thread(request, prompt, sampling, self.vocabulary)
        answer, headers = await self.ask("/inference/v1/generate", body, prompt)
        told = headers.get(VERSION, "none")
        if not told.removeprefix("-").isdecimal():
            raise RuntimeError(
                f"{self.url} says that it sampled with weights of version {told}; start it with "
                "server_command, and give it no weights while prompts are out"
            )
        choices = answer["choices"]
        if len(choices) != sampling.n:
            raise RuntimeError(f"{self.url} gave {len(choices)} responses instead of {sampling.n}")
        longest = sampling.max_new_tokens
        return [
            self._rollout(choice, int(told), len(prompt.input_ids), longest) for choice in choices
        ]

    def _rollout(
        self, choice: Mapping[str, Any], version: int, prompt_tokens: int, longest: int
    ) -> Rollout:
        ids = tuple(choice["token_ids"])
        if choice["finish_reason"] == "error":
            raise RuntimeError(f"{self.url} failed after {len(ids)} tokens; see the server's log")
        routes = None
        # none of what was cut off before the engine read its prompt
        if self.routes and (ids or choice["routed_experts"]):
            chosen = np.load(io.BytesIO(base64.b64decode(choice["routed_experts"])))
            routes = small_routes(chosen, prompt_tokens + len(ids) - 1)
        return Rollout(
            ids=ids,
            logprobs=tuple(token["logprob"] for token in choice["logprobs"]["content"]),
            finish_reason=self.vocabulary.finish_reason(ids, choice["finish_reason"], longest),
            weight_version=version,
            routes=routes,
        )

    async def weight_version(self) -> int:
        return await asyncio.to_thread(self.version)

    async def abort(self) -> None:
        await asyncio.to_thread(self.post, "/pause?mode=abort&clear_cache=false")
        await asyncio.to_thread(self.post, "/resume")

    def version(self) -> int:
        """Version of the weights that the server samples with; -1 before any sync."""
        versions = {version for [version] in self._workers("loaded_version")}
        if len(versions) != 1:
            raise RuntimeError(
                f"the workers of {self.url} have weights of versions {sorted(versions)}"
            )
        return int(versions.pop())

    def settle(self) -> None:
        """See SGLangEngine."""
        self._workers("settle")

    def pause(self) -> None:
        """Stop sampling until `resume`, and get ready for new weights; requests stay."""
        self.post("/pause?mode=keep")
        self._workers("begin_load")

    def resume(self) -> None:
        self.post("/resume")

    def load_ipc(self, handles: Mapping[str, str], version: int) -> None:
        """Load weights from the processes that serve them at `handles` (GPU's UUID: address)."""
        self._workers("load_ipc", handles=dict(handles), version=version)
        self._forget()

    def join_group(
        self, address: str, port: int, first_rank: int, world: int, name: str, backend: str
    ) -> None:
        """See SGLangEngine."""
        self._workers(
            "join_group",
            address=address,
            port=port,
            first_rank=first_rank,
            world=world,
            name=name,
            backend=backend,
        )

    def leave_group(self, name: str) -> None:
        """See SGLangEngine; whatever its name, since workers are in one group at a time."""
        self._workers("leave_group")

    def load_broadcast(
        self, tensors: Sequence[tuple[str, torch.Tensor]], name: str, version: int | None
    ) -> None:
        """See SGLangEngine."""
        self._workers(
            "load_broadcast",
            names=[key for key, _ in tensors],
            dtypes=[str(tensor.dtype).removeprefix("torch.") for _, tensor in tensors],
            shapes=[list(tensor.shape) for _, tensor in tensors],
            version=version,
        )
        if version is not None:
            self._forget()

    def load_disk(self, hf_dir: Path, version: int) -> None:
        """See SGLangEngine."""
        self._workers("load_disk", hf_dir=str(hf_dir), version=version)
        self._forget()

    def _workers(self, method: str, **arguments: Any) -> list[Any]:
        """What every worker answers to a method of vllm_server.WeightExtension."""
        body = {"method": method, "kwargs": arguments}
        answer = self.post("/collective_rpc", body, LOAD_SECONDS)
        return list(answer["results"])

    def _forget(self) -> None:
        """Drop what was computed with the old weights, images' features among it."""
        for cache in ("prefix", "mm", "encoder"):
            self.post(f"/reset_{cache}_cache")

    async def check(self, action: Action) -> None:
        """See EngineClient."""
        answers = await asyncio.to_thread(self._workers, "check_weights", action=action)
        if wrong := [words for [words] in answers if words]:
            raise RuntimeError("; ".join(wrong))

    async def sleep(self) -> None:
        """See ServerClient."""
        await asyncio.to_thread(self.post, "/sleep?level=2")

    async def wake(self, part: Part) -> None:
        """See ServerClient."""
        await asyncio.to_thread(self.post, f"/wake_up?tags={part}")


def request(prompt: Prompt, sampling: Sampling, vocabulary: Vocabulary) -> dict[str, Any]:
    """What vLLM's /inference/v1/generate takes; ValueError unless each image has its tokens."""
    body: dict[str, Any] = {
        "token_ids": list(prompt.input_ids),
        "sampling_params": {
            "n": sampling.n,
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "stop_token_ids": list(vocabulary.stop),
            "logit_bias": {str(token): NEVER for token in vocabulary.forbidden},
            "logprobs": 0,
            "detokenize": False,
            "output_kind": _FINAL_ONLY,
        },
    }
    if prompt.images:
        body["features"] = _features(prompt, vocabulary.image)
    return body


def _features(prompt: Prompt, image_token: int) -> dict[str, Any]:
    """The images, and where their tokens lie."""
    places, position = [], 0
    for token, run in groupby(prompt.input_ids):
        length = len(list(run))
        if token == image_token:
            places.append({"offset": position, "length": length})
        position += length
    if len(places) != len(prompt.images):
        raise ValueError(
            f"row {prompt.row_id}: {len(places)} runs of image tokens and {len(prompt.images)} "
            "images"
        )
    return {
        "mm_hashes": {"image": [image.key for image in prompt.images]},
        "mm_placeholders": {"image": places},
        "kwargs_data": {"image": [_encoded(image) for image in prompt.images]},
    }


def _encoded(image: VisualInputs) -> str:
    """One image in vLLM's message format (vllm/v1/serial_utils.py)."""
    patches, values = image.pixel_values.shape
    pixels = bf16(image).view(torch.uint8).numpy().tobytes()
    grid = torch.tensor(image.grid_thw).numpy().tobytes()
    every = {"slices": [[0, patches, None]], "dim": 0, "keep_on_cpu": False}
    message = {
        "pixel_values": {
            "data": ["bfloat16", [patches, values], msgpack.ExtType(_RAW, pixels)],
            "field": ["flat", every],
        },
        "image_grid_thw": {
            "data": ["int64", [3], msgpack.ExtType(_RAW, grid)],
            "field": ["batched", {"keep_on_cpu": True}],
        },
    }
    return base64.b64encode(msgpack.packb(message)).decode()
