"""Our model of a released architecture has the parameters that transformers' has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from model_providers import backend as backends
from model_providers.parallel import Layout
from model_providers.presets import PRESETS, hf_config
from model_providers.qwen3_vl import Qwen3VLModel
from tests.dist import checks
from tests.dist.ranks import Ranks

LAYERS = 3
"""Decoder layers of the compared models: layers are alike, and experts are slow to build."""


def _parameters(name: str) -> int:
    config = replace(PRESETS[name], num_layers=LAYERS)
    with torch.device("meta"):
        model = Qwen3VLModel(config, checks.parallel_state(Layout()), backends.create("cpu"))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_as_many_parameters_as_transformers(
    ranks: Callable[[int], Ranks], name: str
) -> None:
    raw = hf_config(name)
    raw["text_config"]["num_hidden_layers"] = LAYERS
    config = AutoConfig.for_model(**raw)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    assert isinstance(model, PreTrainedModel)
    wanted = sum(parameter.numel() for parameter in model.parameters())
    assert ranks(1).run(_parameters, name) == [wanted]
