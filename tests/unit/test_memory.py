"""Weights counted as transformers counts them, and what layouts make of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

from model_providers.config import Recompute
from model_providers.memory import activation_bytes, parameters, state_bytes
from model_providers.parallel import Layout
from model_providers.presets import PRESETS, hf_config
from tests.unit.test_presets import read_by_transformers

DENSE, MOE = PRESETS["qwen3-vl-8b"], PRESETS["qwen3-vl-30b-a3b"]


@pytest.mark.parametrize("name", PRESETS)
def test_weights_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    config = read_by_transformers(tmp_path, hf_config(name, "5"))
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    sizes = {key: parameter.numel() for key, parameter in model.named_parameters()}
    found = parameters(PRESETS[name])
    assert found.total == sum(sizes.values())
    vision = {key: size for key, size in sizes.items() if key.startswith("model.visual.")}
    mergers = sum(size for key, size in vision.items() if "merger" in key)
    assert found.mergers == mergers
    assert found.vision == sum(vision.values()) - mergers
    experts = sum(size for key, size in sizes.items() if ".experts." in key)
    assert found.layers * found.experts == experts


def test_one_gpu_holds_everything() -> None:
    count = parameters(DENSE).total
    assert state_bytes(DENSE, Layout(), 1) == (6 * count, 12 * count)
    assert state_bytes(DENSE, Layout(), 1, moment_bytes=2) == (6 * count, 8 * count)


def test_ranks_share_what_they_split() -> None:
    whole, moments = state_bytes(DENSE, Layout(), 1)
    half = state_bytes(DENSE, Layout(tensor=2), 2)
    assert half == (whole / 2, moments / 2)
    # data- and context-parallel ranks hold all weights and share the optimizer
    assert state_bytes(DENSE, Layout(), 8) == (whole, moments / 8)
    assert state_bytes(DENSE, Layout(context=2), 8) == (whole, moments / 8)


def test_experts_have_a_layout_of_their_own() -> None:
    count = parameters(MOE)
    experts = count.layers * count.experts
    rest = count.total - experts
    weights, optimizer = state_bytes(MOE, Layout(tensor=2, expert=4), 8)
    assert weights == 6 * rest / 2 + 6 * experts / 4
    # 4 copies of the rest and 2 of the experts
    assert optimizer == pytest.approx(12 * rest / 2 / 4 + 12 * experts / 4 / 2)


def test_the_stage_that_has_most_counts() -> None:
    count = parameters(DENSE)
    tower = count.vision + count.mergers
    first = 18 * count.layer + count.embedding + tower
    assert state_bytes(DENSE, Layout(pipeline=2), 2)[0] == 6 * first
    uneven = Layout(pipeline=2, first_stage_layers=12)
    assert state_bytes(DENSE, uneven, 2)[0] == 6 * (24 * count.layer + count.head)
    tied = PRESETS["qwen3-vl-4b"]
    count = parameters(tied)
    last = Layout(pipeline=2, first_stage_layers=6)
    # with a copy of the embedding, and the last norm
    wanted = 30 * count.layer + count.embedding + tied.hidden_size
    assert state_bytes(tied, last, 2)[0] == 6 * wanted


def test_a_frozen_part_has_weights_alone() -> None:
    count = parameters(DENSE)
    trained = count.total - count.vision - count.mergers
    found = state_bytes(DENSE, Layout(), 1, frozen=frozenset({"vision", "mergers"}))
    assert found == (2 * count.total + 4 * trained, 12 * trained)


def test_a_discriminator_has_no_language_head() -> None:
    count = parameters(DENSE)
    assert state_bytes(DENSE, Layout(), 1, score=True)[0] == 6 * (count.total - count.head)


def test_activations_are_near_what_was_measured() -> None:
    """Four H200s, 8,192 tokens a micro-batch: the peak (docs/results/h200/dense-bf16.json) less
    weights, gradients and optimizer."""
    weights, optimizer = state_bytes(DENSE, Layout(), 4)
    measured = 124 * 2**30 - weights - optimizer
    found = activation_bytes(DENSE, Layout(), 8192, Recompute())
    assert 0.75 * measured < found < 1.1 * measured


def test_recomputation_and_layouts_save_activations() -> None:
    none = activation_bytes(DENSE, Layout(), 8192, Recompute(), score=True)
    full = activation_bytes(DENSE, Layout(), 8192, Recompute("full"), score=True)
    some = activation_bytes(DENSE, Layout(), 8192, Recompute("selective", ("mlp",)), score=True)
    assert full < none / 8
    assert full < some < none
    # one input a layer, and all of one layer
    assert full == pytest.approx(2 * 8192 * 4096 * 36 + none / 36)
    assert activation_bytes(DENSE, Layout(context=2), 8192, Recompute(), score=True) == none / 2
    split = Layout(tensor=2, sequence_parallel=True)
    assert activation_bytes(DENSE, split, 8192, Recompute(), score=True) == none / 2
    # as many micro-batches in flight as stages
    assert activation_bytes(DENSE, Layout(pipeline=4), 8192, Recompute(), score=True) == none
