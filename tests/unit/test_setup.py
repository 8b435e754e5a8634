"""What a stage asks for is checked before it joins the world, and reaches the model as asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from model_providers.config import Precision, Recompute, TrainingOptions
from model_providers.parallel import Layout
from prism_megatron.config import schema
from prism_megatron.training import setup
from tests import tiny_models


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fp8": "blockwise"}, "fp8='blockwise' needs Transformer Engine"),
        ({"bf16_first_layers": 1}, "mean something with fp8 only"),
        ({"bf16_last_layers": 1}, "mean something with fp8 only"),
        ({"fp8_param_gather": True}, "holds weights as fp8 computes with them, but fp8 is null"),
        ({"offload_layers": 1}, "offload_layers=1 moves activations from a GPU to the host"),
        (
            {"recompute": {"granularity": "selective", "modules": ["layernorm"]}},
            "backend 'cpu' can't recompute layernorm",
        ),
    ],
)
def test_a_second_model_is_refused_before_the_first_collective(
    tmp_path: Path, options: dict[str, object], message: str
) -> None:
    path = tiny_models.save(tmp_path, "dense")
    wrong = schema.Model.model_validate({"path": path, **options})
    with pytest.raises(ValueError, match=message):
        setup.start("cpu", schema.Run(dir=tmp_path), schema.Model(path=path), wrong)
    assert not dist.is_initialized()


def test_a_host_that_is_not_fit_is_refused_before_the_first_collective(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no0")
    with pytest.raises(ValueError, match="GLOO_SOCKET_IFNAME=no0 names no interface"):
        setup.start("cpu", schema.Run(dir=tmp_path))
    assert not dist.is_initialized()


def test_a_section_says_how_its_model_is_trained() -> None:
    section = schema.Model(
        path=Path("model"),
        recompute=schema.Recompute(granularity="full", layers=3, vision=True),
        fp8="tensorwise",
        bf16_first_layers=1,
        bf16_last_layers=2,
        fp8_param_gather=True,
        offload_layers=7,
    )
    assert setup.options_of(section, 0.25, 0.125) == TrainingOptions(
        aux_loss_coef=0.25,
        z_loss_coef=0.125,
        recompute=Recompute("full", (), 3, vision=True),
        offload_layers=7,
        precision=Precision("tensorwise", 1, 2, param_gather=True),
    )
    assert setup.options_of(schema.Model(path=Path("model"))) == TrainingOptions()


def test_every_key_of_the_configuration_reaches_the_layout() -> None:
    sizes: dict[str, Any] = dict(
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
        vision="replicated",
    )
    assert setup.layout_of(schema.Parallel(**sizes)) == Layout(**sizes, sequence_parallel=True)
    assert setup.layout_of(schema.Parallel(tensor=2, sequence=False)) == Layout(tensor=2)
    assert setup.layout_of(schema.Parallel()) == Layout()
