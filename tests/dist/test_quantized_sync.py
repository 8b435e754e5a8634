"""Weights that are quantised on their way to engines are those that the offline quantiser writes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from checkpoint_tools.hf_directory import HFDirectory, SafetensorsDirectory
from checkpoint_tools.quantize import quantize
from checkpoint_tools.weights import unequal
from model_providers import backend as backends
from model_providers.config import Qwen3VLConfig
from model_providers.parallel import Layout
from model_providers.qwen3_vl import Qwen3VLModel
from model_providers.weight_map import load_hf_weights
from model_providers.weight_plan import WeightPlan
from prism_megatron.rollout.sglang import SGLangEngine
from prism_megatron.rollout.vocabulary import Vocabulary
from prism_megatron.rollout.weight_sync import BroadcastSync, DiskSync, IpcSync
from tests import tiny_models
from tests.dist import checks
from tests.dist.ranks import Ranks
from tests.mock_sglang import KEY, MockSGLang, serve

Worlds = Callable[[int], Ranks]
LAYER = "model.language_model.layers.1."


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
        turned_experts=True,
        quantization="fp8-block",
    )
    memory = plan.buffer()
    receives = dist.get_rank() in receivers
    found: dict[str, Tensor] = {}
    wrong = []
    for bucket in plan.buckets:
        memory.fill_(255)  # every bucket has the same memory
        tensors = plan.fill(bucket, memory if receives else None)
        wrong += [name for name, _ in tensors if name in found]
        found |= {name: tensor.clone() for name, tensor in tensors}
        sent = sum(made.weight.nbytes + made.scale.nbytes for made in bucket.quantised)
        assert sent <= 0.51 * bucket.scratch / 2, "half as much as in BF16"
        alone = len({task.hf for task in bucket.tasks}) == 1
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
