"""Weights that are quantised on the way to engines are those that the offline quantiser writes."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, cast
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from checkpoint_tools.hf_directory import HFDirectory, SafetensorsDirectory
from checkpoint_tools.quantize import quantize
from checkpoint_tools.weights import unequal
from model_providers import backend as backends
from model_providers import fp8_blocks, weight_plan
from model_providers.architecture import Qwen3VLConfig
from model_providers.parallel import Layout
from model_providers.qwen3_vl import Qwen3VLModel
from model_providers.weight_map import load_hf_weights
from model_providers.weight_plan import WeightPlan
from prism_megatron.config import schema
from prism_megatron.pipelines import sync_check
from prism_megatron.rollout.fleet import Fleet
from prism_megatron.rollout.quantized import check_cut, served_directory
from prism_megatron.rollout.sglang import SGLangEngine
from prism_megatron.rollout.vocabulary import Vocabulary
from prism_megatron.rollout.weight_check import Action
from prism_megatron.rollout.weight_sync import BroadcastSync, DiskSync, IpcSync
from tests import tiny_models
from tests.dist import checks
from tests.dist.ranks import Ranks
from tests.mock_sglang import KEY, MockSGLang, serve

Worlds = Callable[[int], Ranks]
CONFIG = schema.Rollout(kind="sglang", gpus=(0,), quantization="fp8-block")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """BF16 models, each with what the offline quantiser makes of it in the folder fp8 within."""
    root = tmp_path_factory.mktemp("quantised")
    processor = tiny_models.save_with_processor(root / "processor")
    found = {}
    for name in ("dense", "tied", "moe"):
        kind = "moe" if name == "moe" else "dense"
        path = tiny_models.save_served(root / name, processor, kind, tied=name == "tied")
        shutil.copy(processor / "generation_config.json", path)
        quantize(path, path / "fp8", "fp8-block")
        found[name] = path
    return found


def _model(path: Path, layout: Layout) -> Qwen3VLModel:
    backend = backends.create("cpu")
    parallel = checks.parallel_state(layout)
    backend.seed(3, parallel)
    model = Qwen3VLModel(Qwen3VLConfig.from_hf(path), parallel, backend)
    load_hf_weights(model, HFDirectory(path), str(path))
    return model


def _differences(found: dict[str, Tensor], path: Path) -> list[str]:
    """Names that are missing, surplus, or of other bits than the offline quantiser's; the trainer
    of these tests has in fp32 what the export has in BF16."""
    written = SafetensorsDirectory(path / "fp8")
    wrong = sorted(set(written) ^ set(found))
    for name in set(written) & set(found):
        offline, sent = written[name], found[name]
        if offline.dtype is torch.bfloat16:
            sent = sent.bfloat16()
        if offline.dtype != sent.dtype or offline.shape != sent.shape or unequal(offline, sent):
            wrong.append(name)
    return wrong


def _planned(path: Path, layout: Layout, receivers: list[int], bucket_bytes: int) -> list[str]:
    model = _model(path, layout)
    plan = WeightPlan(
        model,
        receivers=receivers,
        bucket_bytes=bucket_bytes,
        cut_experts=True,
        quantization="fp8-block",
    )
    memory = plan.buffer()
    receives = dist.get_rank() in receivers
    found: dict[str, Tensor] = {}
    wrong = []
    for bucket in plan.buckets:
        memory.fill_(255)  # every bucket has the same memory
        # two rows of blocks of the hidden size
        with mock.patch.object(weight_plan, "_QUANTISED_AT_ONCE", 2**16):
            tensors = plan.fill(bucket, memory if receives else None)
        wrong += [name for name, _ in tensors if name in found]
        found |= {name: tensor.clone() for name, tensor in tensors}
        sent = sum(made.weight.nbytes + made.scale.nbytes for made in bucket.quantised)
        assert sent <= 0.51 * bucket.scratch / 2, "half as much as in BF16"
        alone = len({(task.hf, task.expert) for task in bucket.tasks}) == 1
        plain = sum(whole.nbytes for whole in bucket.plain)
        assert bucket.scratch + plain <= bucket_bytes or alone, "larger than asked for"
    return wrong + (_differences(found, path) if receives else list(found))


@pytest.mark.parametrize(
    "kind, world, layout, receivers, bucket_bytes",
    [
        ("dense", 1, Layout(), [0], 2**30),
        ("dense", 2, Layout(tensor=2, sequence_parallel=True), [0, 1], 2**21),
        ("tied", 4, Layout(tensor=2, pipeline=2), [3], 1),
        ("moe", 1, Layout(), [0], 2**23),
        ("moe", 2, Layout(expert=2), [1], 2**30),
        ("moe", 4, Layout(tensor=2, expert=2, expert_tensor=2, sequence_parallel=True), [0, 2], 1),
        ("moe", 4, Layout(expert=2, pipeline=2), [0], 2**22),
    ],
)
def test_what_is_sent_is_what_the_offline_quantiser_writes(
    ranks: Worlds,
    models: dict[str, Path],
    kind: str,
    world: int,
    layout: Layout,
    receivers: list[int],
    bucket_bytes: int,
) -> None:
    found = ranks(world).run(_planned, models[kind], layout, receivers, bucket_bytes)
    assert found == [[]] * world


def _refused(path: Path) -> str:
    model = _model(path, Layout())
    with pytest.raises(ValueError) as error:
        WeightPlan(model, quantization="fp8-block")
    return str(error.value)


def test_what_blocks_do_not_fit_is_refused(ranks: Worlds, hf_models: dict[str, Path]) -> None:
    [message] = ranks(1).run(_refused, hf_models["dense"])
    assert "down_proj.weight with shape (56, 112) can't be cut into blocks of 128" in message


def _served(path: Path, scratch: Path, way: str) -> Any:
    """What a server that was started with the directory of a run got wrong by the way `way`, with
    its version; the mock checks names and shapes against the model's."""
    model = _model(path, Layout(tensor=2, sequence_parallel=True))
    served = served_directory(CONFIG, model, path, scratch / "served")
    assert not list(served.glob("*.safetensors"))
    # a broadcast comes from the first rank, in whose process a server can't receive it
    home = dist.get_world_size() - 1 if way == "broadcast" else 0
    with ExitStack() as stack:
        server, box = None, [""]
        if dist.get_rank() == home:
            server = MockSGLang(served)
            box = [stack.enter_context(serve(server))]
        dist.broadcast_object_list(box, src=home)
        engine = SGLangEngine(box[0], KEY, Vocabulary.of(served))
        size: Any = {"bucket_bytes": 2**21, "quantization": "fp8-block"}
        sync: Any
        if way == "disk":
            sync = DiskSync(model, served, scratch / "weights", "fp8-block")
        elif way == "broadcast":
            sync = BroadcastSync(model, 1, **size)
        else:
            sync = IpcSync(model, {0: [0, 1]}, timeout_seconds=60, **size)
        for version in (1, 2):
            sync.sync({0: engine}, version)
        asyncio.run(engine.close())
        return None if server is None else (_differences(server.loaded, path), server.version)


@pytest.mark.parametrize("way", ["ipc", "broadcast", "disk"])
@pytest.mark.parametrize("kind", ["dense", "tied"])
def test_servers_get_the_same_bits_by_every_way(
    ranks: Worlds, models: dict[str, Path], tmp_path: Path, kind: str, way: str
) -> None:
    found = ranks(2).run(_served, models[kind], tmp_path, way)
    assert ([], 2) in found


def test_servers_start_with_what_the_offline_quantiser_says_of_the_model(
    ranks: Worlds, models: dict[str, Path], tmp_path: Path
) -> None:
    for kind, path in models.items():
        ranks(2).run(_directory, path, tmp_path / kind)
        written, offline = (
            {file.name: file.read_text() for file in folder.iterdir() if file.suffix == ".json"}
            for folder in (tmp_path / kind, path / "fp8")
        )
        assert {*written, "quantization.json"} == offline.keys()
        assert json.loads(written["config.json"]) == json.loads(offline["config.json"])


def _directory(path: Path, out: Path) -> None:
    model = _model(path, Layout(tensor=2, sequence_parallel=True))
    assert served_directory(CONFIG, model, path, out) == out
    # the offline quantiser's own is taken as it is, weights and all
    assert served_directory(CONFIG, model, path / "fp8", out) == path / "fp8"


def _checked(path: Path, scratch: Path, factor: float) -> list[str]:
    """What sync-check finds of a server that was started with the offline quantiser's export,
    when the sync's scales are off by a factor."""
    model = _model(path, Layout(tensor=2))
    offline = sync_check.quantised_offline(model, path, scratch, "fp8-block")
    with ExitStack() as stack:
        server, box = None, [""]
        if dist.get_rank() == 0:
            server = MockSGLang(offline)
            server.load(load_file(offline / "model.safetensors"), -1)
            box = [stack.enter_context(serve(server))]
        dist.broadcast_object_list(box, src=0)
        engine = SGLangEngine(box[0], KEY, Vocabulary.of(offline))
        sync = IpcSync(model, {0: [0, 1]}, quantization="fp8-block", timeout_seconds=60)
        fleet = cast(Fleet, _OneServer(engine, sync))
        rounded = fp8_blocks.round_blocks

        def off(weight: Tensor, quantised: Tensor, scale: Tensor) -> None:
            rounded(weight, quantised, scale)
            scale.mul_(factor)

        stack.enter_context(mock.patch.object(fp8_blocks, "round_blocks", off))
        problems: list[str] = sync_check.weights_come(fleet, loaded=True)["problems"]
        asyncio.run(engine.close())
        return problems


class _OneServer:
    def __init__(self, engine: SGLangEngine, sync: IpcSync) -> None:
        self.engine, self.way = engine, sync

    def sync(self, version: int) -> dict[str, float]:
        return self.way.sync({0: self.engine}, version)

    def check(self, action: Action) -> list[str]:
        found = [""]
        if dist.get_rank() == 0:
            try:
                asyncio.run(self.engine.check(action))
            except RuntimeError as error:
                found = [str(error)]
        dist.broadcast_object_list(found, src=0)
        return [words for words in found if words]


def test_sync_check_compares_with_the_offline_quantiser(
    ranks: Worlds, models: dict[str, Path], tmp_path: Path
) -> None:
    assert ranks(2).run(_checked, models["dense"], tmp_path, 1.0) == [[], []]
    wrong, _ = ranks(2).run(_checked, models["dense"], tmp_path, 1.0 + 2**-20)
    # seven projections of two layers
    assert len(wrong) == 1 and "14 of 88 tensors differ" in wrong[0]


def test_parts_of_blocks_are_refused(models: dict[str, Path]) -> None:
    def refusal(kind: str, tensor: int, *arguments: str) -> str:
        config = CONFIG.model_copy(update={"tensor": tensor, "server_args": arguments})
        large = {"num_heads": 32, "num_kv_heads": 4, "head_dim": 128, "intermediate_size": 9728}
        large["moe_intermediate_size"] = 768
        try:
            check_cut(config, replace(Qwen3VLConfig.from_hf(models[kind]), **large))
        except ValueError as error:
            return str(error)
        return ""

    # sizes of Qwen3-VL-4B and 30B-A3B
    assert refusal("dense", 4) == refusal("moe", 2) == refusal("moe", 8, "--ep-size=8") == ""
    assert "intermediate_size=9728 to be a multiple of 128 on each of rollout.tensor=8" in refusal(
        "dense", 8
    )
    assert "moe_intermediate_size=768 to be a multiple of 128" in refusal("moe", 4)
