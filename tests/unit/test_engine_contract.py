"""The embedded engine beside an event loop, and the clients of SGLang and vLLM servers, keep the
contract of EngineClient."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from prism_megatron.rollout.actors import AsyncLocalEngine
from prism_megatron.rollout.engine import EngineClient
from prism_megatron.rollout.sglang import SGLangEngine
from prism_megatron.rollout.vllm import VLLMEngine
from prism_megatron.rollout.vocabulary import Vocabulary
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
