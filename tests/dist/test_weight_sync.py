"""Weights reach servers as they are, from any layout; what goes wrong is an error on every rank."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from model_providers import backend as backends
from model_providers.architecture import Qwen3VLConfig
from model_providers.parallel import Layout
from model_providers.qwen3_vl import Qwen3VLModel
from model_providers.weight_map import load_hf_weights
from prism_megatron.config.schema import Sampling
from prism_megatron.rollout import ipc_load
from prism_megatron.rollout.local import LocalEngine
from prism_megatron.rollout.sglang import SGLangEngine
from prism_megatron.rollout.vocabulary import Vocabulary
from prism_megatron.rollout.weight_sync import (
    BroadcastSync,
    DiskSync,
    IpcSync,
    StoredSync,
    SyncFailed,
)
from prism_megatron.types import Prompt
from tests import tiny_models
from tests.dist import checks
from tests.dist.ranks import Ranks
from tests.mock_sglang import KEY, MockSGLang, serve
from tests.unit.test_local_engine import prompts, save, tiny_model

Worlds = Callable[[int], Ranks]


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def hf_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny_model(tied=request.param), tmp_path_factory.mktemp("served"))


def _model(path: Path, layout: Layout) -> Qwen3VLModel:
    backend = backends.create("cpu")
    parallel = checks.parallel_state(layout)
    backend.seed(3, parallel)
    model = Qwen3VLModel(Qwen3VLConfig.from_hf(path), parallel, backend)
    load_hf_weights(model, load_file(path / "model.safetensors"), str(path))
    return model


class _Keeps(MockSGLang):
    """Only keeps weights: the engine in it is a dense model's."""

    def load(self, weights: dict[str, torch.Tensor], version: int) -> None:
        self.loaded, self.version = weights, version


def _server(path: Path) -> MockSGLang:
    return (_Keeps if Qwen3VLConfig.from_hf(path).num_experts else MockSGLang)(path)


def _sync(path: Path, layout: Layout, refuse: str, forget: bool, scratch: Path | None) -> Any:
    """The error, or the names that the server got changed or not at all, with what it was asked."""
    model = _model(path, layout)
    with ExitStack() as stack:
        mock, box = None, [""]
        if dist.get_rank() == 0:
            mock = _server(path)
            mock.refuse, mock.forget_version = refuse, forget
            box = [stack.enter_context(serve(mock))]
        dist.broadcast_object_list(box, src=0)
        engine = SGLangEngine(box[0], KEY, Vocabulary.of(path))
        if scratch:
            sync: Any = DiskSync(model, path, scratch)
        else:
            ranks = {1: list(range(dist.get_world_size()))}
            sync = IpcSync(model, ranks, bucket_bytes=2**15, timeout_seconds=5)
        try:
            phases = sync.sync({1: engine}, 3)
        except RuntimeError as error:
            return [str(error)], [], False
        finally:
            asyncio.run(engine.close())
        assert phases["total"] >= sum(s for name, s in phases.items() if name != "total") * 0.99
        if mock is None:
            return None
        weights = load_file(path / "model.safetensors")
        same = {n for n, t in mock.loaded.items() if n in weights and torch.equal(t, weights[n])}
        return sorted(set(weights) ^ same), mock.paths, mock.paused


@pytest.mark.parametrize(
    "world, layout",
    [
        (1, Layout()),
        (2, Layout(tensor=2, sequence_parallel=True)),
        (4, Layout(tensor=2, pipeline=2, first_stage_layers=1)),
    ],
)
def test_engines_on_the_trainers_gpus_map_every_weight(
    ranks: Worlds, hf_dir: Path, world: int, layout: Layout
) -> None:
    wrong, paths, paused = ranks(world).run(_sync, hf_dir, layout, "", False, None)[0]
    assert wrong == [] and not paused
    assert paths == [
        "/freeze_gc",
        "/pause_generation",
        "/update_weights_from_ipc",
        "/continue_generation",
        "/model_info",
    ]


@pytest.fixture(scope="module")
def experts_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_models.build("moe")
    model.generation_config = tiny_model().generation_config
    return save(model, tmp_path_factory.mktemp("experts"))


@pytest.mark.parametrize(
    "world, layout",
    [
        (1, Layout()),
        (2, Layout(expert=2)),
        (4, Layout(tensor=2, expert=2, expert_tensor=2, sequence_parallel=True)),
    ],
)
def test_experts_come_under_names_that_say_how_they_lie(
    ranks: Worlds, experts_dir: Path, world: int, layout: Layout
) -> None:
    wrong, _, paused = ranks(world).run(_sync, experts_dir, layout, "", False, None)[0]
    assert wrong == [] and not paused


def _broadcast(path: Path, layout: Layout) -> Any:
    """What a server in another process got changed or not at all, with what it was asked."""
    model = _model(path, layout)
    with ExitStack() as stack:
        # a host whose own name leads nowhere
        stack.enter_context(patch.object(socket, "gethostbyname", side_effect=OSError("no name")))
        mock, box = None, [""]
        # the first rank sends, so the server lives with the last one
        if dist.get_rank() == dist.get_world_size() - 1:
            mock = _server(path)
            box = [stack.enter_context(serve(mock))]
        dist.broadcast_object_list(box, src=dist.get_world_size() - 1)
        servers = {0: SGLangEngine(box[0], KEY, Vocabulary.of(path))}
        sync = BroadcastSync(model, 1, bucket_bytes=2**15)
        for version in (3, 4):
            if version == 4:
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter.mul_(2)
            sync.sync(servers, version)
        if mock is None:
            return None
        weights = load_file(path / "model.safetensors")
        same = {n for n, t in mock.loaded.items() if n in weights and t.equal(weights[n] * 2)}
        return sorted(set(weights) ^ same), mock.paths, mock.version


def test_engines_on_gpus_of_their_own_are_sent_every_weight(ranks: Worlds, hf_dir: Path) -> None:
    layout = Layout(tensor=2, sequence_parallel=True)
    wrong, paths, version = ranks(2).run(_broadcast, hf_dir, layout)[1]
    assert wrong == [] and version == 4
    assert paths.count("/init_weights_update_group") == 1
    assert paths.count("/update_weights_from_distributed") > 4


def test_experts_come_by_broadcast_too(ranks: Worlds, experts_dir: Path) -> None:
    wrong, _, version = ranks(2).run(_broadcast, experts_dir, Layout(expert=2))[1]
    assert wrong == [] and version == 4


def test_engines_elsewhere_read_a_folder_that_is_gone_afterwards(
    ranks: Worlds, hf_dir: Path, tmp_path: Path
) -> None:
    layout = Layout(tensor=2, sequence_parallel=True)
    wrong, paths, _ = ranks(2).run(_sync, hf_dir, layout, "", False, tmp_path)[0]
    assert wrong == [] and paths == [
        "/pause_generation",
        "/update_weights_from_disk",
        "/continue_generation",
        "/model_info",
    ]
    assert list(tmp_path.iterdir()) == []


def _stored(path: Path) -> list[list[str]]:
    """Paths asked by syncs of a directory: at first, again, and after the engine was restarted."""
    mock, asked = MockSGLang(path), []
    with serve(mock) as url:
        engine = SGLangEngine(url, KEY, Vocabulary.of(path))
        for restarted in (False, False, True):
            mock.version, mock.paths = -1 if restarted else mock.version, []
            StoredSync(path).sync({1: engine}, 0)
            asked.append(mock.paths)
        asyncio.run(engine.close())
    weights = load_file(path / "model.safetensors")
    assert all(torch.equal(tensor, mock.loaded[name]) for name, tensor in weights.items())
    return asked


def test_engines_read_a_directory_unless_they_have_it(ranks: Worlds, hf_dir: Path) -> None:
    [[first, again, restarted]] = ranks(1).run(_stored, hf_dir)
    assert (
        first
        == restarted
        == [
            "/model_info",
            "/pause_generation",
            "/update_weights_from_disk",
            "/continue_generation",
            "/model_info",
        ]
    )
    assert again == ["/model_info", "/continue_generation", "/model_info"]


@pytest.mark.parametrize(
    "refuse, forget, words",
    [
        ("/update_weights_from_ipc", False, "told to refuse"),
        ("", True, "version 3 were sent"),
    ],
)
def test_a_failed_sync_is_an_error_on_every_rank(
    ranks: Worlds, hf_dir: Path, refuse: str, forget: bool, words: str
) -> None:
    found = ranks(2).run(_sync, hf_dir, Layout(tensor=2), refuse, forget, None)
    assert all(words in message for [message], _, _ in found), found


def _beside_others(path: Path) -> Any:
    """The engines that a sync broke of one that reads, one that refuses, one that has the version
    and is paused, and one that is not there; version of the first and whether they wait."""
    mocks = [MockSGLang(path) for _ in range(3)]
    mocks[1].refuse = "/update_weights_from_disk"
    mocks[2].version, mocks[2].paused = 4, True
    with ExitStack() as stack:
        urls = [stack.enter_context(serve(mock)) for mock in mocks]
        with serve(MockSGLang(path)) as gone:
            urls.append(gone)
        vocabulary = Vocabulary.of(path)
        servers = {i: SGLangEngine(url, KEY, vocabulary) for i, url in enumerate(urls)}
        with pytest.raises(SyncFailed) as caught:
            StoredSync(path).sync(servers, 4)
    broken = caught.value.broken
    return broken, mocks[0].version, [mock.paused for mock in mocks]


def test_an_engine_that_does_not_load_leaves_the_others_sampling(
    ranks: Worlds, hf_dir: Path
) -> None:
    [(broken, version, paused)] = ranks(1).run(_beside_others, hf_dir)
    assert sorted(broken) == [1, 3]
    assert "told to refuse" in broken[1] and "ConnectError" in broken[3]
    assert version == 4 and paused == [False, True, False]


class _AnswersForItsFirstRank(MockSGLang):
    """As SGLang, whose ranks keep their errors to themselves; the second has no room."""

    def answer(self, path: str, body: Any) -> Any:
        if path != "/update_weights_from_ipc":
            return super().answer(path, body)
        (gpu, handle), (_, other) = body["zmq_handles"].items()
        with ThreadPoolExecutor(1) as pool:
            pool.submit(self._fail, other)
            return super().answer(path, body | {"zmq_handles": {gpu: handle}})

    def _fail(self, handle: str) -> None:
        def take(tensors: object) -> None:
            raise torch.OutOfMemoryError("no room")

        with suppress(RuntimeError):
            ipc_load.receive(handle, torch.device("cpu"), take, lambda: None)


@contextmanager
def _served[M: MockSGLang](kind: Callable[[Path], M], path: Path) -> Iterator[tuple[M | None, Any]]:
    """A server of rank 0's, which other ranks do not have, and a client of it."""
    with ExitStack() as stack:
        mock, box = None, [""]
        if dist.get_rank() == 0:
            mock = kind(path)
            box = [stack.enter_context(serve(mock))]
        dist.broadcast_object_list(box, src=0)
        yield mock, SGLangEngine(box[0], KEY, Vocabulary.of(path))


def _half_loaded(path: Path) -> Any:
    """The engines that a sync broke, and the version that the server has, and whether it waits."""
    model = _model(path, Layout(tensor=2))
    with _served(_AnswersForItsFirstRank, path) as (mock, engine):
        sync = IpcSync(model, {1: [0, 1]}, bucket_bytes=2**15, timeout_seconds=20)
        with pytest.raises(SyncFailed) as caught:
            sync.sync({1: engine}, 3)
        return caught.value.broken, mock and (mock.version, mock.paused)


def test_an_engine_one_rank_of_which_failed_does_not_sample_whatever_version_it_tells(
    ranks: Worlds, hf_dir: Path
) -> None:
    (broken, server), (others, _) = ranks(2).run(_half_loaded, hf_dir)
    assert server == (3, True)
    assert broken == others and list(broken) == [1]
    assert broken[1].startswith("rank 1: ") and "no room" in broken[1]


class _Told(MockSGLang):
    """Keeps what its ranks were told instead of weights."""

    def __init__(self, hf_dir: Path) -> None:
        super().__init__(hf_dir)
        self.told: list[str] = []

    def _update(self, handle: str) -> dict[str, torch.Tensor]:
        try:
            return super()._update(handle)
        except RuntimeError as error:
            self.told.append(str(error))
            return {}


def _out_of_memory(path: Path) -> Any:
    """What an engine is told when its trainers have no memory for the third bucket."""
    model = _model(path, Layout(tensor=2))
    with _served(_Told, path) as (mock, engine):
        sync = IpcSync(model, {1: [0, 1]}, bucket_bytes=2**15)
        fill, third = sync.plan.fill, sync.plan.buckets[2]

        def fails(bucket: Any, *arguments: Any) -> Any:
            if bucket is third:
                raise torch.OutOfMemoryError("no room")
            return fill(bucket, *arguments)

        broken = patch.object(sync.plan, "fill", fails)
        with broken, pytest.raises(torch.OutOfMemoryError):
            sync.sync({1: engine}, 3)
        deadline = time.monotonic() + 60
        while mock and len(mock.told) < 2 and time.monotonic() < deadline:
            time.sleep(0.1)
        return mock and mock.told


def test_an_error_of_a_rank_itself_ends_it_and_the_load(ranks: Worlds, hf_dir: Path) -> None:
    told, _ = ranks(2).run(_out_of_memory, hf_dir)
    assert told == ["OutOfMemoryError: no room"] * 2


def test_a_server_samples_from_the_trainers_own_ids_and_pixels(hf_dir: Path) -> None:
    sampling = Sampling(n=3, max_new_tokens=12)
    asked = prompts()
    local = LocalEngine(hf_dir, seed=5)
    mock = MockSGLang(hf_dir)
    mock.load(load_file(hf_dir / "model.safetensors"), 7)
    with serve(mock) as url:
        answers = asyncio.run(_ask(url, hf_dir, asked, sampling))
    for prompt, found in zip(asked, answers, strict=True):
        [expected] = local.sample([prompt], sampling, ["key"])
        assert [r.ids for r in found] == [r.ids for r in expected]
        assert [r.logprobs for r in found] == [r.logprobs for r in expected]
        assert [r.finish_reason for r in found] == [r.finish_reason for r in expected]
        assert {r.weight_version for r in found} == {7}


async def _ask(url: str, hf_dir: Path, asked: list[Prompt], sampling: Sampling) -> list[Any]:
    engine = SGLangEngine(url, KEY, Vocabulary.of(hf_dir))
    await engine.health()
    found = await asyncio.gather(*(engine.generate(p, sampling, "") for p in asked))
    await engine.close()
    return list(found)


def test_a_wrong_key_is_told(hf_dir: Path) -> None:
    with serve(MockSGLang(hf_dir)) as url:
        engine = SGLangEngine(url, "guessed", Vocabulary.of(hf_dir))
        with pytest.raises(RuntimeError, match="status 401"):
            engine.version()
