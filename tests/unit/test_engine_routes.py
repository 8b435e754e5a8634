"""The experts that tokens took, as servers tell them and as a rollout holds them."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from prism_megatron.config.schema import Sampling
from prism_megatron.rollout import sglang, vllm
from prism_megatron.rollout.vocabulary import Vocabulary
from prism_megatron.types import Prompt

PROMPT, IDS, LONGEST, LAYERS, CHOICES = 4, (11, 12, 13), 6, 5, 2
VOCABULARY = Vocabulary(stop=(13,), image=1, forbidden=(1, 2), size=20)


def chosen(experts: int) -> NDArray[Any]:
    """Of all tokens but the last, of every layer."""
    tokens = PROMPT + len(IDS) - 1
    return np.random.default_rng(experts).integers(0, experts, (tokens, LAYERS, CHOICES))


def by_sglang(routes: NDArray[Any]) -> Any:
    engine = sglang.SGLangEngine("http://localhost", "key", VOCABULARY, routes=True)
    meta = {
        "prompt_tokens": PROMPT,
        "output_token_logprobs": [[-0.5, token, None] for token in IDS],
        "finish_reason": {"type": "stop"},
        "weight_version": "3",
        "cached_tokens": 2,
        "routed_experts": base64.b64encode(routes.astype(np.int32).tobytes()).decode(),
    }
    return engine._rollout(meta, PROMPT, LONGEST)


def by_vllm(routes: NDArray[Any]) -> Any:
    engine = vllm.VLLMEngine("http://localhost", "key", VOCABULARY, routes=True)
    file = io.BytesIO()
    np.save(file, routes.astype(np.int16))
    choice = {
        "token_ids": list(IDS),
        "logprobs": {"content": [{"logprob": -0.5}] * len(IDS)},
        "finish_reason": "stop",
        "routed_experts": base64.b64encode(file.getvalue()).decode(),
    }
    return engine._rollout(choice, 3, PROMPT, LONGEST)


@pytest.mark.parametrize("engine", [by_sglang, by_vllm])
@pytest.mark.parametrize("experts, kind", [(128, torch.uint8), (512, torch.int16)])
def test_rollouts_hold_the_experts_of_every_token(engine: Any, experts: int, kind: Any) -> None:
    found = engine(chosen(experts)).routes
    assert found.dtype == kind and found.shape == (PROMPT + len(IDS) - 1, LAYERS * CHOICES)
    assert torch.equal(found.long(), torch.from_numpy(chosen(experts)).flatten(1))


def test_sglang_is_asked_for_them_only_where_they_count() -> None:
    prompt = Prompt("row", (5, 6), ())
    for routes in (False, True):
        body = sglang.request(prompt, Sampling(n=2), VOCABULARY, routes=routes)
        assert body["return_routed_experts"] == routes
        for program in (sglang, vllm):
            command, _ = program.server_command(
                Path("none"), host="h", port=1, api_key="k", routes=routes
            )
            assert ("--enable-return-routed-experts" in command) == routes
