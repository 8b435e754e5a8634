"""The embedded engine beside an event loop, and the clients of SGLang and vLLM servers, keep the
contract of EngineClient."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from unittest.mock import AsyncMock, patch

import pytest

from prism_megatron.config.schema import Sampling
from prism_megatron.rollout import http_engine
from prism_megatron.rollout.actors import AsyncLocalEngine, in_words
from prism_megatron.rollout.engine import EngineClient
from prism_megatron.rollout.sglang import SGLangEngine
from prism_megatron.rollout.vllm import VLLMEngine
from prism_megatron.rollout.vocabulary import Vocabulary
from prism_megatron.types import Prompt, Rollout
from tests.engine_contract import CASES, SEEDED, VERSION, WEIGHTS_SEED
from tests.mock_sglang import KEY, MockSGLang, serve
from tests.mock_vllm import MockVLLM
from tests.unit.test_local_engine import save, tiny_model


@pytest.fixture(scope="module")
def hf_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny_model(), tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("case", [*CASES, *SEEDED], ids=lambda case: case.__name__)
def test_contract(hf_dir: Path, case: Callable[[EngineClient], Awaitable[None]]) -> None:
    async def run() -> None:
        engine = AsyncLocalEngine(hf_dir, seed=7)
        await engine.start(60)
        weights = list(tiny_model(seed=WEIGHTS_SEED).named_parameters())
        await engine.load_weights(weights, VERSION)
        await case(engine)

    asyncio.run(run())


@pytest.mark.parametrize(("client", "server"), [(SGLangEngine, MockSGLang), (VLLMEngine, MockVLLM)])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_contract_over_http(
    hf_dir: Path,
    client: type[SGLangEngine | VLLMEngine],
    server: type[MockSGLang],
    case: Callable[[EngineClient], Awaitable[None]],
) -> None:
    async def run(url: str) -> None:
        engine = client(url, KEY, Vocabulary.of(hf_dir))
        await case(engine)
        await engine.close()

    mock = server(hf_dir)
    mock.load(dict(tiny_model(seed=WEIGHTS_SEED).named_parameters()), VERSION)
    with serve(mock) as url:
        asyncio.run(run(url))


@pytest.mark.parametrize("routes", [False, True])
def test_what_is_cut_off_in_a_servers_queue_is_a_rollout_of_nothing(
    hf_dir: Path, routes: bool
) -> None:
    async def run(url: str) -> list[Rollout]:
        engine = SGLangEngine(url, KEY, Vocabulary.of(hf_dir), routes=routes)
        prompt = Prompt("row", (3, 4, 5), ())
        waiting = asyncio.create_task(
            engine.generate(prompt, Sampling(n=2, max_new_tokens=4), "key")
        )
        while not waiting.done():
            await asyncio.sleep(0.05)
            await engine.abort()
        await engine.close()
        return await waiting

    mock = MockSGLang(hf_dir)
    mock.busy, mock.version = True, 6
    with serve(mock) as url:
        found = asyncio.run(run(url))
    assert [(r.ids, r.finish_reason, r.weight_version, r.routes) for r in found] == 2 * [
        ((), "abort", 6, None)
    ]


def test_responses_take_as_long_as_they_take(hf_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that has not answered yet is no server that hangs; the fleet bounds a request."""
    monkeypatch.setattr(http_engine, "CONTROL_SECONDS", 0.3)

    async def run(url: str) -> list[Rollout]:
        engine = SGLangEngine(url, KEY, Vocabulary.of(hf_dir))
        prompt = Prompt("row", (3, 4, 5), ())
        waiting = asyncio.create_task(engine.generate(prompt, Sampling(n=2), "key"))
        await asyncio.sleep(1)
        while not waiting.done():
            await engine.abort()
            await asyncio.sleep(0.05)
        await engine.close()
        return await waiting

    mock = MockSGLang(hf_dir)
    mock.busy = True
    with serve(mock) as url:
        assert len(asyncio.run(run(url))) == 2


@pytest.mark.parametrize(
    "ids, reason",
    [
        ((5, 13), "stop"),
        ((5, 6), "abort"),
        ((5, 6, 7), "length"),
        ((5, 99), "invalid"),
        ((), "abort"),
    ],
)
def test_what_had_ended_when_it_was_cut_off_is_not_continued(
    ids: tuple[int, ...], reason: str
) -> None:
    """SGLang appends a token and then asks first whether the request was cut off."""
    vocabulary = Vocabulary(stop=(12, 13), image=1, forbidden=(1, 2), size=20)
    meta = {
        "prompt_tokens": 4,
        "output_token_logprobs": [[-0.5, token, None] for token in ids],
        "finish_reason": {"type": "abort"},
        "weight_version": "3",
        "cached_tokens": 2,
    }
    sampling = Sampling(n=1, max_new_tokens=3)

    async def run() -> list[Rollout]:
        engine = SGLangEngine("http://localhost", "key", vocabulary)
        answer = AsyncMock(return_value=({"meta_info": meta}, {}))
        with patch.object(engine, "ask", answer):
            return await engine.generate(Prompt("row", (3, 4, 5, 6), ()), sampling, "key")

    [found] = asyncio.run(run())
    assert (found.ids, found.finish_reason) == (ids, reason)


def test_a_server_is_idle_before_it_sleeps_and_its_health_takes_no_sample(hf_dir: Path) -> None:
    async def run(url: str) -> None:
        engine = SGLangEngine(url, KEY, Vocabulary.of(hf_dir))
        await engine.sleep()
        await engine.health()
        await engine.wake("weights")
        await engine.wake("kv_cache")

    mock = MockSGLang(hf_dir)
    with serve(mock) as url:
        asyncio.run(run(url))
    assert mock.paths == [
        "/flush_cache?timeout=60",
        "/release_memory_occupation",
        "/health",
        "/server_info",
        "/resume_memory_occupation",
        "/resume_memory_occupation",
    ]
    assert mock.woken == [["weights"], ["kv_cache", "cuda_graph"]]


def test_a_defect_says_where_it_is() -> None:
    def told(action: Callable[[], object]) -> str:
        try:
            action()
        except Exception as error:
            return in_words(error)
        raise AssertionError("nothing was raised")

    assert re.fullmatch(
        r"KeyError: 'prompt_tokens' \(test_engine_contract\.py:\d+\)",
        told(lambda: {}["prompt_tokens"]),  # type: ignore[misc]
    )
    assert told(lambda: int("x")) == "ValueError: invalid literal for int() with base 10: 'x'"
