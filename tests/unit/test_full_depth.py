"""Released sizes at full depth and width: every stage of a layout is built, without memory.

torch's fake process group gives one process any rank of any world; nothing is sent.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
import torch.distributed as dist
import yaml
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForImageTextToText

from model_providers import backend as backends
from model_providers.parallel import Layout, ParallelState
from model_providers.presets import PRESETS, hf_config
from model_providers.qwen3_vl import Qwen3VLModel
from model_providers.weight_map import Local, local_tasks
from prism_megatron.config.schema import Parallel
from prism_megatron.training.setup import layout_of
from tests.unit.test_model_config import DEPTHS
from tests.unit.test_presets import read_by_transformers
from tests.unit.test_shipped_layouts import FILES

MODELS = {94: "qwen3-vl-235b-a22b", 64: "qwen3-vl-32b", 48: "qwen3-vl-30b-a3b"}
MODELS |= {36: "qwen3-vl-4b", 28: "qwen3-vl-2b"}
EMBEDDING = ("model.language_model.embed_tokens.weight",)


def _stages(name: str, layout: Layout, world: int) -> Iterator[list[Local]]:
    """What the first rank of each stage holds."""
    backend = backends.create("cpu")
    for stage in range(layout.pipeline):
        rank = stage * (world // layout.pipeline)
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
        try:
            parallel = ParallelState.create(layout)
            assert parallel.pipeline_rank == stage
            with torch.device("meta"):
                model = Qwen3VLModel(PRESETS[name], parallel, backend)
            yield list(local_tasks(model))
        finally:
            dist.destroy_process_group()


@cache
def _released(name: str) -> dict[str, int]:
    """Sizes of transformers' tensors."""
    with TemporaryDirectory() as folder, torch.device("meta"):
        config = read_by_transformers(Path(folder), hf_config(name, "5"))
        model = AutoModelForImageTextToText.from_config(config)
    return {key: parameter.numel() for key, parameter in model.named_parameters()}


def _check(name: str, layout: Layout, world: int) -> None:
    """Every weight is on one stage, and its shards make up transformers' tensors."""
    stages: Counter[tuple[str, ...]] = Counter()
    sizes: Counter[tuple[str, ...]] = Counter()
    for tasks in _stages(name, layout, world):
        for entry in tasks:
            assert entry.parameter.device.type == "meta"
            task = entry.task
            # experts are spread, of which this rank has the first ones
            stages[task.hf] += task.expert <= 0
            ranks = task.parts * (layout.expert if task.expert >= 0 else 1)
            sizes[task.hf] += prod(task.shape) * ranks
    copies = 2 if PRESETS[name].tie_word_embeddings and layout.pipeline > 1 else 1
    assert stages.pop(EMBEDDING) == copies
    assert set(stages.values()) == {1}
    sizes[EMBEDDING] //= copies
    released = _released(name)
    assert {one for names in sizes for one in names} == set(released)
    assert sizes == {names: sum(released[one] for one in names) for names in sizes}


SHIPPED = [
    (facts["model"], Parallel(**facts["layout"]), max(facts["gpus"]))
    for facts in (yaml.safe_load(path.read_text())["vars"] for path in FILES)
]


@pytest.mark.parametrize("name, parallel, gpus", SHIPPED, ids=[path.stem for path in FILES])
def test_a_shipped_layout_builds_at_full_depth(name: str, parallel: Parallel, gpus: int) -> None:
    _check(name, layout_of(parallel), gpus)


@pytest.mark.parametrize("depth, layout", [case for case in DEPTHS if case[0] in MODELS])
def test_real_depths_build_at_every_number_of_stages(depth: int, layout: Layout) -> None:
    name = MODELS[depth]
    if PRESETS[name].num_experts:
        layout = replace(layout, tensor=2, sequence_parallel=True, expert=16)
    _check(name, layout, 16 * layout.pipeline)
