from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model_providers import backend as backends
from model_providers.parallel import Layout
from prism_megatron.config.schema import Model, Optimizer, Parallel, Run, Train
from prism_megatron.training.setup import build_runner, layout_of


def test_every_key_of_the_configuration_reaches_the_layout() -> None:
    sizes = dict(
        tensor=2,
        context=3,
        pipeline=5,
        virtual_pipeline=7,
        expert=11,
        expert_tensor=13,
        first_stage_layers=17,
        last_stage_layers=19,
        embedding_as_layer=True,
        loss_as_layer=True,
    )
    assert layout_of(Parallel(**sizes)) == Layout(**sizes, sequence_parallel=True)
    assert layout_of(Parallel(tensor=2, sequence=False)) == Layout(tensor=2)
    assert layout_of(Parallel()) == Layout()


def test_a_discriminator_that_could_not_be_saved_is_refused_at_once(tmp_path: Path) -> None:
    backend = replace(backends.create("cpu"), name="cuda", dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="checkpointed yet; run this stage with backend=cpu"):
        build_runner(
            Model(path=tmp_path / "not-read"),
            Optimizer(lr=1e-3),
            backend,
            Train(steps=1),
            Run(dir=tmp_path),
            pad_id=0,
            head="score",
        )
