"""Weights counted as transformers counts them, and what layouts make of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from model_providers import memory
from model_providers.architecture import Qwen3VLConfig
from model_providers.config import Recompute
from model_providers.memory import Memory, parameters, sync_bytes, training_bytes
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


def held(config: Qwen3VLConfig, layout: Layout, world: int, **options: Any) -> tuple[float, float]:
    """Weights with gradients, and optimizer."""
    found = training_bytes(config, layout, world, tokens=0, **options)
    return found.weights + found.gradients, found.optimizer


def activations(layout: Layout, *, patches: float = 0, **options: Any) -> Memory:
    world = layout.tensor * layout.context * layout.pipeline
    return training_bytes(DENSE, layout, world, tokens=8192, patches=patches, **options)


def test_one_gpu_holds_everything() -> None:
    count = parameters(DENSE).total
    assert held(DENSE, Layout(), 1) == (6 * count, 12 * count)
    assert held(DENSE, Layout(), 1, moment_bytes=2) == (6 * count, 8 * count)


def test_ranks_share_what_they_split() -> None:
    whole, moments = held(DENSE, Layout(), 1)
    half = held(DENSE, Layout(tensor=2), 2)
    assert half == (whole / 2, moments / 2)
    # data- and context-parallel ranks hold all weights and share the optimizer
    assert held(DENSE, Layout(), 8) == (whole, moments / 8)
    assert held(DENSE, Layout(context=2), 8) == (whole, moments / 8)


def test_experts_have_a_layout_of_their_own() -> None:
    count = parameters(MOE)
    experts = count.layers * count.experts
    rest = count.total - experts
    weights, optimizer = held(MOE, Layout(tensor=2, expert=4), 8)
    # and of a layer's gate and up projections the gradient in BF16
    assert weights == 6 * rest / 2 + 6 * experts / 4 + 2 * 2 / 3 * count.experts / 4
    # 4 copies of the rest and 2 of the experts
    assert optimizer == pytest.approx(12 * rest / 2 / 4 + 12 * experts / 4 / 2)


def test_the_stage_that_has_most_counts() -> None:
    count = parameters(DENSE)
    tower = count.vision + count.mergers
    first = 18 * count.layer + count.embedding + tower
    assert held(DENSE, Layout(pipeline=2), 2)[0] == 6 * first
    uneven = Layout(pipeline=2, first_stage_layers=12)
    assert held(DENSE, uneven, 2)[0] == 6 * (24 * count.layer + count.head)
    tied = PRESETS["qwen3-vl-4b"]
    count = parameters(tied)
    last = Layout(pipeline=2, first_stage_layers=6)
    # with a copy of the embedding, and the last norm
    wanted = 30 * count.layer + count.embedding + tied.hidden_size
    assert held(tied, last, 2)[0] == 6 * wanted


def test_a_frozen_part_has_weights_alone() -> None:
    count = parameters(DENSE)
    trained = count.total - count.vision - count.mergers
    frozen = frozenset({"vision", "mergers"})
    found = training_bytes(DENSE, Layout(), 1, tokens=7, patches=100, frozen=frozen)
    assert found.weights + found.gradients == 2 * count.total + 4 * trained
    assert found.optimizer == 12 * trained
    assert found.vision == 0
    tower = training_bytes(DENSE, Layout(), 1, tokens=7, patches=100, frozen=frozenset({"vision"}))
    assert 0 < tower.vision < activations(Layout(), patches=100).vision / 20


def test_a_discriminator_has_no_language_head() -> None:
    count = parameters(DENSE)
    found = training_bytes(DENSE, Layout(), 1, tokens=7, score=True)
    assert found.weights + found.gradients == 6 * (count.total - count.head)
    assert found.head == 0


def test_fp8_keeps_matrices_twice_and_their_inputs_once() -> None:
    bf16, fp8 = activations(Layout()), activations(Layout(), fp8=True)
    matrices = 36 * DENSE.token_weights
    assert fp8.fp8 == pytest.approx(2 * matrices, rel=1e-3)
    inputs = 3 * DENSE.hidden_size + DENSE.intermediate_size
    assert bf16.language - fp8.language == 8192 * 36 * inputs


def test_offload_takes_the_optimizer_out_of_all_but_the_update() -> None:
    found = activations(Layout())
    assert found.pieces < found.activations < found.optimizer
    assert found.peak(offload=True) == found.peak() - found.optimizer
    # weights and moments of the head, with the last norm, and of two pieces
    assert found.pieces == 12 * (parameters(DENSE).head + 2 * memory.PIECE)
    again = activations(Layout(), recompute=Recompute("full", vision=True))
    assert again.activations < again.pieces
    assert again.peak(offload=True) - memory.BUFFERS == again.held(True) + again.pieces
    assert found.peak() - memory.BUFFERS == sum(vars(found).values()) - found.pieces


def test_recomputation_and_layouts_save_activations() -> None:
    none = activations(Layout(), score=True).language
    full = activations(Layout(), score=True, recompute=Recompute("full")).language
    half = activations(Layout(), score=True, recompute=Recompute("full", layers=18)).language
    mlp = Recompute("selective", ("mlp",))
    some = activations(Layout(), score=True, recompute=mlp).language
    assert full < none / 8
    assert full < some < none
    # one input a layer, and all of one layer
    assert full == pytest.approx(2 * 8192 * 4096 * 36 + none / 36)
    assert half == pytest.approx(2 * 8192 * 4096 * 18 + none / 2 + none / 36)
    assert activations(Layout(context=2), score=True).language == none / 2
    split = Layout(tensor=2, sequence_parallel=True)
    assert activations(split, score=True).language == none / 2


def test_the_tower_is_on_the_first_stage_and_split_but_for_its_norms() -> None:
    one = activations(Layout(), patches=1000).vision
    block = 2 * (10 * 1152 + 2 * 4304) * 27 + 2 * 4 * 1152 * 4
    assert one == 1000 * block
    assert one / 2 < activations(Layout(tensor=2), patches=1000).vision < one
    again = activations(Layout(), patches=1000, recompute=Recompute(vision=True)).vision
    assert again < one / 5


def test_a_replicated_tower_is_whole_on_every_tensor_parallel_rank() -> None:
    count = parameters(DENSE)
    tower = count.vision + count.mergers
    layout = Layout(tensor=4, vision="replicated")
    weights, optimizer = held(DENSE, layout, 8)
    rest = (count.total - tower) / 4
    assert weights == 6 * (rest + tower)
    # spread over the two data-parallel ranks
    assert optimizer == 12 * (rest + tower) / 2
    assert activations(layout, patches=1000).vision == activations(Layout(), patches=1000).vision
    frozen = training_bytes(DENSE, layout, 8, tokens=7, frozen=frozenset({"vision"}))
    assert frozen.gradients == 4 * (rest + count.mergers)


@pytest.mark.parametrize(
    "vision, images, most", [("sharded", 3, 1.5), ("replicated", 3, 1), ("replicated", 11, 2)]
)
def test_images_of_a_replicated_tower_are_whole(vision: Any, images: int, most: float) -> None:
    """Five tensor-parallel ranks of two that differ in context."""
    assert memory.images_of_a_rank(Layout(tensor=5, context=2, vision=vision), images) == most


def test_a_schedule_holds_as_many_micro_batches_as_there_are_stages() -> None:
    none = activations(Layout(), score=True).language
    assert activations(Layout(pipeline=4), score=True).language == none
    assert activations(Layout(pipeline=4), score=True, micro_batches=2).language == none / 2
    # two chunks of 4: 4 of the first, 4 of the second and 3 of the first again, of 4.5 layers each
    chunks = Layout(pipeline=4, virtual_pipeline=2, embedding_as_layer=True, loss_as_layer=True)
    config = replace(DENSE, num_layers=38)
    found = training_bytes(config, chunks, 4, tokens=8192, score=True)
    # the first chunk has 4 layers beside the embedding, the second 5
    assert found.language == pytest.approx(none / 36 * (7 * 4 + 4 * 5))


def test_weights_in_fp8_save_two_bytes_but_in_the_update() -> None:
    ranks = Layout(tensor=2)
    fp8 = training_bytes(DENSE, ranks, 8, tokens=7, fp8=True)
    held = training_bytes(DENSE, ranks, 8, tokens=7, fp8=True, fp8_param_gather=True)
    matrices = 36 * DENSE.token_weights / 2
    saved = fp8.weights + fp8.fp8 - held.weights - held.fp8
    assert saved == pytest.approx(2 * matrices, rel=1e-3)
    assert held.fp8 == pytest.approx(matrices, rel=1e-3)
    assert (held.gradients, held.optimizer) == (fp8.gradients, fp8.optimizer)
    # of the main weights of a rank, of which there are four to share them
    assert held.rounding == pytest.approx(2 * matrices / 4, rel=1e-3) and fp8.rounding == 0
    assert held.passing(True) == max(held.activations, held.pieces) == held.pieces
    assert held.passing(False) == max(held.activations, held.rounding)


def test_experts_stay_in_bf16_and_keep_what_they_read_in_it() -> None:
    ranks = Layout(expert=4)
    bf16 = training_bytes(MOE, ranks, 8, tokens=7)
    fp8 = training_bytes(MOE, ranks, 8, tokens=7, fp8=True)
    held = training_bytes(MOE, ranks, 8, tokens=7, fp8=True, fp8_param_gather=True)
    count = parameters(MOE)
    layer = count.layers * count.layer
    assert fp8.held(False) - bf16.held(False) == pytest.approx(2 * layer)
    assert fp8.held(False) - held.held(False) == pytest.approx(2 * layer)
    assert held.rounding == pytest.approx(2 * layer / 8)
    inputs = MOE.hidden_size + MOE.num_heads * MOE.head_dim
    assert bf16.language - fp8.language == 7 * count.layers * inputs


def test_layers_in_host_memory_keep_nothing_on_the_device() -> None:
    none, some = activations(Layout(tensor=2)), activations(Layout(tensor=2), offload_layers=9)
    assert some.language == none.language * 27 / 36
    assert (some.head, some.weights) == (none.head, none.weights)


def test_a_sync_takes_two_buckets_and_what_ranks_exchange() -> None:
    # an embedding of 151,936 x 4,096
    assert sync_bytes(DENSE, Layout()) == 2 * 2 * 151936 * 4096
    assert sync_bytes(PRESETS["qwen3-vl-4b"], Layout()) == 2 * 2**30
    # 128 experts of 3,072 x 4,096 are three times as large, and come in parts
    assert sync_bytes(PRESETS["qwen3-vl-235b-a22b"], Layout(expert=8)) == 4 * 2 * 151936 * 4096
