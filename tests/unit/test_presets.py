"""The released architectures: both dialects of config.json, and transformers' parameter counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)

from checkpoint_tools.hf_writer import in_dialect
from model_providers.architecture import Qwen3VLConfig
from model_providers.presets import PRESETS, Dialect, hf_config

BILLIONS = {
    "qwen3-vl-2b": 2.13,
    "qwen3-vl-4b": 4.44,
    "qwen3-vl-8b": 8.77,
    "qwen3-vl-32b": 33.4,
    "qwen3-vl-30b-a3b": 31.1,
    "qwen3-vl-235b-a22b": 236,
}
"""Sizes of the releases."""


def read_by_transformers(directory: Path, raw: dict[str, Any]) -> PreTrainedConfig:
    (directory / "config.json").write_text(json.dumps(raw))
    return AutoConfig.from_pretrained(directory)


@pytest.mark.parametrize("dialect", ["4.57", "5"])
@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_survives_its_file(name: str, dialect: Dialect) -> None:
    assert Qwen3VLConfig.from_dict(hf_config(name, dialect), name) == PRESETS[name]


@pytest.mark.parametrize("dialect", ["4.57", "5"])
@pytest.mark.parametrize("name", PRESETS)
def test_transformers_reads_the_file_and_writes_the_same_model(
    name: str, dialect: Dialect, tmp_path: Path
) -> None:
    read_by_transformers(tmp_path, hf_config(name, dialect)).save_pretrained(tmp_path)
    assert Qwen3VLConfig.from_hf(tmp_path) == PRESETS[name]


@pytest.mark.parametrize("name", PRESETS)
def test_the_file_holds_what_transformers_writes(name: str, tmp_path: Path) -> None:
    own = hf_config(name, "5")
    read_by_transformers(tmp_path, own).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    for section in ("text_config", "vision_config"):
        assert written[section] == written[section] | own.pop(section)
    assert written == written | own


@pytest.mark.parametrize("name", PRESETS)
def test_transformers_model_of_the_file_has_the_released_size(name: str, tmp_path: Path) -> None:
    config = read_by_transformers(tmp_path, hf_config(name, "4.57"))
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    assert isinstance(model, PreTrainedModel)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count / 1e9 == pytest.approx(BILLIONS[name], rel=5e-3)


def test_an_unknown_preset_is_named() -> None:
    with pytest.raises(ValueError, match=r"'qwen3-vl-9b' is no preset; there are qwen3-vl-2b, "):
        hf_config("qwen3-vl-9b")


@pytest.mark.parametrize("name, tied", [("qwen3-vl-4b", True), ("qwen3-vl-30b-a3b", False)])
@pytest.mark.parametrize("written", ["4.57", "5"])
@pytest.mark.parametrize("exported", ["4.57", "5"])
@pytest.mark.parametrize("version", [None, "4.57.0", "5.2.0"])
def test_both_parts_of_an_exported_configuration_say_whether_embeddings_are_tied(
    name: str, tied: bool, written: Dialect, exported: Dialect, version: str | None
) -> None:
    raw = hf_config(name, written)
    # a file that does not say who wrote it, or a wrong one, is read by its keys
    raw |= {"transformers_version": version} if version else {}
    # as transformers 4.57 leaves it out, and 5 has its own default there
    text = {key: v for key, v in raw["text_config"].items() if key != "tie_word_embeddings"}
    if written == "5":
        text["tie_word_embeddings"] = True
    found = in_dialect(raw | {"text_config": text}, exported)
    assert (found["tie_word_embeddings"], found["text_config"]["tie_word_embeddings"]) == (
        tied,
        tied,
    )
    assert ("rope_parameters" in found["text_config"]) == (exported == "5")
    assert ("rope_theta" in found["text_config"]) == (exported == "4.57")
    assert found["transformers_version"].startswith(exported[0])
