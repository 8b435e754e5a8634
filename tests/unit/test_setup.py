from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model_providers import backend as backends
from prism_megatron.config.schema import Model, Optimizer, Run, Train
from prism_megatron.training.setup import build_runner


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
