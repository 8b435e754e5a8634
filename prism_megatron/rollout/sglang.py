"""One SGLang server, over HTTP: sampling from the trainer's own ids and pixels, and its control.

Prompt: ids, patches --/generate--> rollout/sglang_server in the server takes both as they are
ids, log-probabilities, finish reason, weight version <--'
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prism_megatron.config.schema import Sampling
from prism_megatron.rollout import pixels
from prism_megatron.rollout.engine import LOAD_SECONDS, Part
from prism_megatron.rollout.http_engine import NEVER, HttpEngine, small_routes
from prism_megatron.rollout.vocabulary import Vocabulary
from prism_megatron.rollout.weight_check import Action
from prism_megatron.types import Prompt, Rollout, VisualInputs


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

    python: of the environment that has SGLang. hf_dir needs no weights: they come by a weight sync.
    routes: it shall tell the experts that tokens take. options go to SGLang as they are.
    """
    command = [python, "-m", "prism_megatron.rollout.sglang_server", "--model-path", str(hf_dir)]
    command += ["--host", host, "--port", str(port)]
    command += ["--tp-size", str(tensor), "--weight-version", "-1", "--skip-tokenizer-init"]
    command += ["--enable-memory-saver", "--log-level", "warning", *options]
    if routes:
        command.append("--enable-return-routed-experts")
    # a model that is to get other weights anyway
    if not any(Path(hf_dir).glob("*.safetensors")):
        command += ["--load-format", "dummy"]
    environment = {
        "SGLANG_API_KEY": api_key,
        "SGLANG_EXTERNAL_MM_PROCESSOR_PACKAGE": "prism_megatron.rollout.sglang_server",
        "SGLANG_EXTERNAL_MODEL_PACKAGE": "prism_megatron.rollout.sglang_server.models",
        # image features of the weights before last are of no use, and are not cleared by a sync
        "SGLANG_VLM_CACHE_SIZE_MB": "0",
        # log-probabilities at temperature 1 and of the whole vocabulary, as the trainer's
        "SGLANG_RETURN_ORIGINAL_LOGPROB": "1",
        # /health says whether the server has started, and does not sample
        "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "0",
        # not served, but by default the port plus 10,000, which may be none
        "SGLANG_GRPC_PORT": str(port),
    }
    return command, environment


class SGLangEngine(HttpEngine):
    """Client of one server; see EngineClient and weight_sync.Server."""

    async def generate(self, prompt: Prompt, sampling: Sampling, key: str) -> list[Rollout]:
        """sampling.n rollouts. Random numbers are the server's own; `key` does not determine them.

        A response that holds an id of no token has finish_reason "invalid".
        """
        # images are preprocessed here, which others need not wait for
        body = await asyncio.to_thread(
            request, prompt, sampling, self.vocabulary, routes=self.routes
        )
        answer, _ = await self.ask("/generate", body, prompt)
        answers = answer if isinstance(answer, list) else [answer]
        if len(answers) != sampling.n:
            raise RuntimeError(f"{self.url} gave {len(answers)} responses instead of {sampling.n}")
        return [
            self._rollout(one["meta_info"], len(prompt.input_ids), sampling.max_new_tokens)
            for one in answers
        ]

    def _rollout(self, meta: Mapping[str, Any], prompt_tokens: int, longest: int) -> Rollout:
        # of what it cuts off in its queue, where it had to wait or was put back to, the server
        # tells what had been sampled until then, and neither the prompt's length nor experts
        queued = meta["finish_reason"]["type"] == "abort" and "prompt_tokens" not in meta
        if not queued and meta["prompt_tokens"] != prompt_tokens:
            raise RuntimeError(
                f"{self.url} read a prompt of {meta['prompt_tokens']} tokens instead of "
                f"{prompt_tokens}; its processor is not that of prism_megatron.rollout."
                "sglang_server, so start it with server_command"
            )
        tokens = [(token, logprob) for logprob, token, *_ in meta["output_token_logprobs"]]
        ids = tuple(token for token, _ in tokens)
        routes = None
        if self.routes and not queued:
            chosen = np.frombuffer(base64.b64decode(meta["routed_experts"]), dtype=np.int32)
            routes = small_routes(chosen, prompt_tokens + len(ids) - 1)
        return Rollout(
            ids=ids,
            logprobs=tuple(logprob for _, logprob in tokens),
            finish_reason=self.vocabulary.finish_reason(
                ids, meta["finish_reason"]["type"], longest
            ),
            weight_version=int(meta["weight_version"]),
            routes=routes,
            cached=0 if queued else meta["cached_tokens"],
        )

    async def weight_version(self) -> int:
        return await asyncio.to_thread(self.version)

    async def abort(self) -> None:
        await asyncio.to_thread(self.post, "/abort_request", {"abort_all": True})

    def version(self) -> int:
        """Version of the weights that the server samples with; -1 before any sync."""
        return int(self.get("/model_info")["weight_version"])

    def settle(self) -> None:
        """Take what has been loaded so far out of Python's garbage collection, which the engine
        runs twice in every weight update and which otherwise takes most of its time."""
        self.post("/freeze_gc")

    def pause(self) -> None:
        """Stop sampling; requests stay, and go on after `resume` with the weights of then."""
        self.post("/pause_generation", {"mode": "retract"})

    def resume(self) -> None:
        self.post("/continue_generation")

    def load_ipc(self, handles: Mapping[str, str], version: int) -> None:
        """Load weights from the processes that serve them at `handles` (GPU's UUID: address)."""
        self.post(
            "/update_weights_from_ipc",
            {"zmq_handles": dict(handles), "weight_version": str(version)},
            LOAD_SECONDS,
        )

    def join_group(
        self, address: str, port: int, first_rank: int, world: int, name: str, backend: str
    ) -> None:
        """Take part in a group of torch.distributed; returns when it is complete."""
        self.post(
            "/init_weights_update_group",
            {
                "master_address": address,
                "master_port": port,
                "rank_offset": first_rank,
                "world_size": world,
                "group_name": name,
                "backend": backend,
            },
            LOAD_SECONDS,
        )

    def leave_group(self, name: str) -> None:
        """Leave the group of that name, at the same time as the others do."""
        self.post("/destroy_weights_update_group", {"group_name": name})

    def load_broadcast(
        self, tensors: Sequence[tuple[str, torch.Tensor]], name: str, version: int | None
    ) -> None:
        """Load tensors of these shapes, which rank 0 of the group sends one after the other.

        version: the weights' number, with the last ones.
        """
        self.post(
            "/update_weights_from_distributed",
            {
                "names": [key for key, _ in tensors],
                "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in tensors],
                "shapes": [list(tensor.shape) for _, tensor in tensors],
                "group_name": name,
                "flush_cache": version is not None,
                "weight_version": None if version is None else str(version),
            },
            LOAD_SECONDS,
        )

    def load_disk(self, hf_dir: Path, version: int) -> None:
        """Load the weights of a Hugging Face directory that the server can read."""
        self.post(
            "/update_weights_from_disk",
            {
                "model_path": str(hf_dir),
                # otherwise that of the server's start, which may have been without weights
                "load_format": "auto",
                "weight_version": str(version),
            },
            LOAD_SECONDS,
        )

    async def health(self) -> None:
        """Whether the scheduler answers; /health samples a token instead, which no engine that is
        asleep can."""
        await super().health()
        await asyncio.to_thread(self.get, "/server_info")

    async def sleep(self) -> None:
        """See ServerClient."""
        # waits for the batch that was begun before the last answer came, which still writes
        await asyncio.to_thread(self.post, "/flush_cache?timeout=60")
        await asyncio.to_thread(self.post, "/release_memory_occupation")

    async def wake(self, part: Part) -> None:
        """See ServerClient."""
        tags = ["weights"] if part == "weights" else ["kv_cache", "cuda_graph"]
        await asyncio.to_thread(self.post, "/resume_memory_occupation", {"tags": tags})

    async def check(self, action: Action) -> None:
        """See EngineClient."""
        await asyncio.to_thread(self.post, "/weights_checker", {"action": action}, LOAD_SECONDS)


def request(
    prompt: Prompt, sampling: Sampling, vocabulary: Vocabulary, *, routes: bool = False
) -> dict[str, Any]:
    """What SGLang's /generate and Engine.generate take."""
    parameters = {
        "n": sampling.n,
        "max_new_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "stop_token_ids": list(vocabulary.stop),
        "logit_bias": {str(token): NEVER for token in vocabulary.forbidden},
    }
    body: dict[str, Any] = {
        "input_ids": list(prompt.input_ids),
        "sampling_params": parameters,
        "return_logprob": True,
        "return_routed_experts": routes,
    }
    if prompt.images:
        images = [_image(image) for image in prompt.images]
        # several samples make a batch of one prompt, whose images are a list in a list
        body["image_data"] = [images] if sampling.n > 1 else images
    return body


def _image(image: VisualInputs) -> dict[str, Any]:
    """As rollout/sglang_server reads it. `hash` names the content, for the prefix cache."""
    digest = hashlib.blake2b(image.key.encode(), digest_size=7).digest()
    return {
        "format": "prism_megatron",
        "pixels": pixels.encode(image),
        "grid_thw": list(image.grid_thw),
        "hash": int.from_bytes(digest),
    }
