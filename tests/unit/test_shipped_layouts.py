"""Every layout in configs/layouts/ fits its model, its numbers of GPUs and their memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from model_providers.backend import ABILITIES
from model_providers.config import Recompute
from model_providers.memory import CONTEXT, training_bytes
from model_providers.presets import PRESETS
from prism_megatron.config import load as configuration
from prism_megatron.config import schema
from prism_megatron.planner.search import FILL
from prism_megatron.training.setup import check_models, layout_of

FILES = sorted((Path(__file__).resolve().parents[2] / "configs" / "layouts").glob("*.yaml"))
SFT = """
run: {dir: runs/x}
data: {path: sft.json}
train: {steps: 7}
model: {path: model, parallel: "${vars.layout}", recompute: "${vars.recompute}"}
optimizer:
  lr: 1e-3
  offload: ${vars.optimizer.offload}
backend: cuda
batch_size: 4
"""


def test_every_released_size_has_a_layout() -> None:
    assert {yaml.safe_load(path.read_text())["vars"]["model"] for path in FILES} == set(PRESETS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_shipped_layout_fits(path: Path, tmp_path: Path) -> None:
    own = tmp_path / "sft.yaml"
    own.write_text(SFT)
    config = configuration.load("sft", [own, path], [])
    assert isinstance(config, schema.SFT)
    facts = yaml.safe_load(path.read_text())["vars"]
    assert path.stem.startswith(facts["model"])
    layout = layout_of(config.model.parallel)
    check_models(config, {"model": PRESETS[facts["model"]]}, ABILITIES["cuda"])
    assert facts["gpus"]
    recompute = Recompute(**config.model.recompute.model_dump())
    offload = config.optimizer.offload
    for gpus in facts["gpus"]:
        configuration.check_world(config.model.parallel, gpus)
        need = training_bytes(
            PRESETS[facts["model"]],
            layout,
            gpus,
            tokens=8192,
            patches=4096 / layout.context,
            recompute=recompute,
            offload=offload,
        )
        assert need.held(offload) <= 0.7e9 * facts["gpu_memory_gb"], gpus
        assert CONTEXT + need.peak(offload) <= FILL * 1e9 * facts["gpu_memory_gb"], gpus


def test_the_table_has_every_file() -> None:
    table = (FILES[0].parent / "README.md").read_text()
    rows = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| qwen")]
    assert sorted(rows) == [path.stem for path in FILES]


def test_every_released_size_has_a_layout_of_many_gpus() -> None:
    found = [yaml.safe_load(path.read_text())["vars"] for path in FILES]
    for gigabytes in (80, 141):
        largest = {one["model"] for one in found if one["gpu_memory_gb"] == gigabytes
                   and 256 in one["gpus"]}  # fmt: skip
        assert largest == set(PRESETS)
