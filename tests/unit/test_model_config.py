"""Layouts and architectures that do not go together are refused with the numbers in question."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from model_providers import backend as backends
from model_providers import checks
from model_providers.architecture import Qwen3VLConfig
from model_providers.config import (
    Precision,
    Recompute,
    TrainingOptions,
    stage_layers,
    text_transformer_config,
)
from model_providers.parallel import Layout
from model_providers.qwen3_vl import padded_vocab_size
from tests import tiny_models


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Qwen3VLConfig]:
    root = tmp_path_factory.mktemp("hf")
    return {
        kind: Qwen3VLConfig.from_hf(tiny_models.save(root / kind, kind))
        for kind in ("dense", "moe")
    }


@pytest.mark.parametrize(
    "kind, layout, message",
    [
        ("dense", Layout(tensor=4), "6 attention heads can't be split in 4"),
        ("dense", Layout(tensor=3), "2 key-value heads can't be split in 3"),
        ("dense", Layout(pipeline=3), "4 decoder layers can't be split in 3"),
        ("dense", Layout(expert=2), "expert parallel size 2, but the model is dense"),
        ("moe", Layout(expert=3), "4 experts can't be split in 3"),
        ("moe", Layout(expert_tensor=0), "expert_tensor=0 is no size; give 1 or more"),
        ("moe", Layout(tensor=2), "experts with tensor parallelism need sequence parallelism"),
    ],
)
def test_a_layout_that_does_not_divide_the_model_is_refused(
    configs: dict[str, Qwen3VLConfig], kind: str, layout: Layout, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        checks.check_layout(configs[kind], layout)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_kv_heads": 3, "num_heads": 6}, "3 key-value heads can't be split in 2"),
        ({"intermediate_size": 113}, "113 feed-forward size can't be split in 2"),
    ],
)
def test_every_split_dimension_is_checked(
    configs: dict[str, Qwen3VLConfig], changes: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        checks.check_layout(replace(configs["dense"], **changes), Layout(tensor=2))


@pytest.mark.parametrize("field, value", [("num_heads", 3), ("intermediate_size", 75)])
def test_the_vision_tower_is_checked_too(
    configs: dict[str, Qwen3VLConfig], field: str, value: int
) -> None:
    config = configs["dense"]
    config = replace(config, vision=replace(config.vision, **{field: value}))
    with pytest.raises(ValueError, match=f"{value} vision .* can't be split in 2.*=replicated"):
        checks.check_layout(config, Layout(tensor=2))
    checks.check_layout(config, Layout(tensor=2, vision="replicated"))


@pytest.mark.parametrize(
    "changes, dtype, message",
    [
        ({"moe_intermediate_size": 36}, torch.float32, "features a rank 18 .* are 72 bytes"),
        ({"hidden_size": 58}, torch.float32, "hidden size 58 .* are 232 bytes.* a multiple of 4"),
        ({"hidden_size": 72}, torch.float8_e4m3fn, "hidden size 72 .* a multiple of 16"),
    ],
)
def test_experts_whose_rows_the_kernel_cannot_read_are_refused(
    configs: dict[str, Qwen3VLConfig], changes: dict[str, int], dtype: torch.dtype, message: str
) -> None:
    layout = Layout(expert_tensor=2)
    sizes = {"hidden_size": 64, "moe_intermediate_size": 96}
    fits = replace(configs["moe"], **sizes)
    checks.check_experts(fits, layout, dtype)
    checks.check_experts(replace(configs["dense"], **changes), layout, dtype)
    with pytest.raises(ValueError, match=message):
        checks.check_experts(replace(fits, **changes), layout, dtype)


@pytest.mark.parametrize(
    "kind, layout",
    [
        ("dense", Layout(tensor=2, pipeline=4)),
        ("dense", Layout(tensor=2, pipeline=2, sequence_parallel=True)),
        ("moe", Layout(tensor=2, expert=4, pipeline=2, sequence_parallel=True)),
    ],
)
def test_a_layout_that_fits_is_accepted(
    configs: dict[str, Qwen3VLConfig], kind: str, layout: Layout
) -> None:
    checks.check_layout(configs[kind], layout)


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'tpu' is not one of \['cpu', 'cuda'\]"):
        backends.create("tpu")


@pytest.mark.parametrize(
    "layout, world, data, expert_data",
    [
        (Layout(), 1, 1, 1),
        (Layout(tensor=2, pipeline=3), 12, 2, 4),
        (Layout(tensor=2, expert=4), 8, 4, 2),
        (Layout(tensor=2, expert=2, expert_tensor=2, pipeline=2), 16, 4, 2),
    ],
)
def test_data_parallel_size_is_what_is_left(
    layout: Layout, world: int, data: int, expert_data: int
) -> None:
    assert layout.data(world) == data
    assert layout.expert_data(world) == expert_data


@pytest.mark.parametrize(
    "layout, world, words",
    [
        (Layout(tensor=3), 4, ["tensor=3", "multiple of 3", "world has 4", "Start 3"]),
        (Layout(tensor=2, pipeline=4), 2, ["tensor=2", "pipeline=4", "8 ranks", "world has 2"]),
    ],
)
def test_a_world_of_the_wrong_size_is_refused_with_its_factors(
    layout: Layout, world: int, words: list[str]
) -> None:
    with pytest.raises(ValueError) as error:
        layout.data(world)
    assert all(word in str(error.value) for word in words), error.value


def test_experts_need_a_world_that_holds_them() -> None:
    with pytest.raises(ValueError, match=r"expert=4 .* multiple of 4 ranks, but the world has 2"):
        Layout(expert=4).expert_data(2)


@pytest.mark.parametrize(
    "vocab, tensor, padded",
    [(203, 1, 203), (203, 2, 204), (203, 4, 204), (203, 8, 208), (208, 8, 208)],
)
def test_vocabulary_is_padded_to_the_next_multiple(vocab: int, tensor: int, padded: int) -> None:
    assert padded_vocab_size(vocab, tensor) == padded


def test_configuration_is_read_from_the_file(
    configs: dict[str, Qwen3VLConfig], tmp_path: Path
) -> None:
    moe = configs["moe"]
    assert (moe.num_experts, moe.top_k, moe.moe_intermediate_size) == (4, 2, 40)
    assert (moe.hidden_size, moe.num_heads, moe.num_kv_heads, moe.head_dim) == (56, 6, 2, 16)
    assert moe.vision.patch_dim == 3 * 2 * 8 * 8
    assert moe.num_deepstack == 3
    assert configs["dense"].num_experts == 0
    assert not moe.tie_word_embeddings
    tied = Qwen3VLConfig.from_hf(tiny_models.save(tmp_path / "tied", "dense", tied=True))
    assert tied.tie_word_embeddings


@pytest.mark.parametrize(
    "layout, message",
    [
        (Layout(virtual_pipeline=2), "virtual_pipeline can't be set with a single pipeline stage"),
        (Layout(loss_as_layer=True), "loss_as_layer can't be set with a single pipeline stage"),
        (
            Layout(pipeline=2, first_stage_layers=1, loss_as_layer=True),
            "first_stage_layers and loss_as_layer can't be set together",
        ),
        (
            Layout(pipeline=2, virtual_pipeline=2, last_stage_layers=1),
            "last_stage_layers=1 decoder layers can't be split in 2 virtual stages",
        ),
        (
            Layout(pipeline=2, first_stage_layers=2, last_stage_layers=1),
            "4 decoder layers, 1 of them outside of first_stage_layers and last_stage_layers,",
        ),
        (
            Layout(pipeline=3, first_stage_layers=1),
            r"4 decoder layers, 3 of them .* can't be split in 2 \(2 pipeline stages with 1 ",
        ),
        (Layout(pipeline=2, first_stage_layers=4), "0 of them .* can't be split in 1"),
        (Layout(pipeline=2, virtual_pipeline=4), "4 decoder layers can't be split in 8"),
        (
            Layout(pipeline=2, embedding_as_layer=True),
            "4 decoder layers, with embedding_as_layer 5, can't be split in 2",
        ),
    ],
)
def test_layers_that_do_not_fill_the_stages_are_refused(
    configs: dict[str, Qwen3VLConfig], layout: Layout, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        checks.check_layout(configs["dense"], layout)
    if layout.pipeline > 1:
        # megatron.core refuses it as well
        with pytest.raises((ValueError, AssertionError)):
            _allocation(configs["dense"], layout)


COUNTED = {"embedding_as_layer": True, "loss_as_layer": True}
DEPTHS = [
    *[(94, Layout(pipeline=8, virtual_pipeline=chunks, **COUNTED)) for chunks in (3, 4, 6, 12)],
    (94, Layout(pipeline=16, **COUNTED)),
    (94, Layout(pipeline=16, virtual_pipeline=3, **COUNTED)),
    (94, Layout(pipeline=32, virtual_pipeline=3, **COUNTED)),
    (94, Layout(pipeline=8, first_stage_layers=10)),
    (94, Layout(pipeline=8, first_stage_layers=11, last_stage_layers=11)),
    (94, Layout(pipeline=4, virtual_pipeline=2, first_stage_layers=22, last_stage_layers=24)),
    (94, Layout(pipeline=8, virtual_pipeline=2, first_stage_layers=12, last_stage_layers=10)),
    *[(48, Layout(pipeline=2, virtual_pipeline=chunks)) for chunks in (1, 2, 12, 24)],
    *[(48, Layout(pipeline=pipeline)) for pipeline in (1, 4, 8, 16)],
    (48, Layout(pipeline=4, virtual_pipeline=4)),
    (46, Layout(pipeline=4, virtual_pipeline=6, **COUNTED)),
    *[(28, Layout(pipeline=pipeline)) for pipeline in (1, 2, 4, 7)],
    (28, Layout(pipeline=2, virtual_pipeline=7)),
    *[(36, Layout(pipeline=pipeline)) for pipeline in (1, 2, 4)],
    (36, Layout(pipeline=4, virtual_pipeline=3)),
    *[(64, Layout(pipeline=pipeline)) for pipeline in (1, 2, 4, 8)],
    (64, Layout(pipeline=4, virtual_pipeline=4)),
    (64, Layout(pipeline=8, virtual_pipeline=8)),
]


def _allocation(config: Qwen3VLConfig, layout: Layout) -> list[range]:
    """Layers of each (virtual) stage in the order that a token passes them."""
    return [
        stage_layers(config, layout, stage, chunk)
        for chunk in range(layout.virtual_pipeline)
        for stage in range(layout.pipeline)
    ]


@pytest.mark.parametrize("depth, layout", DEPTHS)
def test_every_layer_of_real_depths_is_somewhere_once_and_in_order(
    configs: dict[str, Qwen3VLConfig], depth: int, layout: Layout
) -> None:
    config = replace(configs["moe"], num_layers=depth)
    checks.check_layout(config, layout)
    hops = _allocation(config, layout)
    assert [layer for layers in hops for layer in layers] == list(range(depth))
    if layout.first_stage_layers:
        held = sum(len(hops[i]) for i in range(0, len(hops), layout.pipeline))
        assert held == layout.first_stage_layers


@pytest.mark.parametrize("depth, layout", DEPTHS)
def test_deepstack_features_leave_a_stage_until_they_are_added(
    configs: dict[str, Qwen3VLConfig], depth: int, layout: Layout
) -> None:
    config = replace(configs["moe"], num_layers=depth)
    travelling = config.num_deepstack
    for layers in _allocation(config, layout):
        assert config.deepstack_left(layers.start) == travelling
        travelling -= sum(layer < config.num_deepstack for layer in layers)
        assert config.deepstack_left(layers.stop) == travelling
    assert travelling == 0


def test_a_stage_may_hold_the_embedding_alone(configs: dict[str, Qwen3VLConfig]) -> None:
    config = replace(configs["moe"], num_layers=94)
    layout = Layout(pipeline=8, virtual_pipeline=12, **COUNTED)
    assert [len(layers) for layers in _allocation(config, layout)] == [0, *[1] * 94, 0]


@pytest.mark.parametrize(
    "kind, architecture, experts, message",
    [
        ("moe", "dense", 4, "'dense', but a model with 4 experts is shared or dedicated"),
        ("dense", "shared", 0, "'shared', but a model with 0 experts is dense"),
        ("moe", "split", 4, "'split', but a model with 4 experts is shared or dedicated"),
        ("moe", "dedicated", 5, "num_experts=5 between perception and reasoning"),
        ("moe", "dedicated", 2, "takes top_k=2 of its section's"),
    ],
)
def test_a_discriminator_that_its_experts_contradict_is_refused(
    tmp_path: Path, kind: str, architecture: str, experts: int, message: str
) -> None:
    raw = json.loads((tiny_models.save(tmp_path, kind) / "config.json").read_text())
    raw["prism_discriminator"] = {"architecture": architecture}
    raw["text_config"]["num_experts"] = experts
    with pytest.raises(ValueError, match=message):
        Qwen3VLConfig.from_dict(raw, "config.json")


@pytest.mark.parametrize(
    "part, changes, message",
    [
        ("text", {"num_key_value_heads": 4}, "6 attention heads can't share 4 key-value heads"),
        ("text", {"head_dim": 18}, r"\[4, 2, 2\] does not add up to half of head_dim 18"),
        ("text", {"num_experts_per_tok": 5}, "can't take 5 of 4 experts"),
        ("text", {"num_experts_per_tok": 0}, "can't take 0 of 4 experts"),
        ("text", {"hidden_size": 64}, "gives 56 channels to a decoder of 64"),
        ("vision", {"depth": 2}, r"\[0, 1, 2\] are not ascending numbers .* 2 blocks"),
        ("vision", {"deepstack_visual_indexes": [1, 0, 2]}, r"\[1, 0, 2\] are not ascending"),
        ("vision", {"num_heads": 5}, "48 channels of images do not divide by 5 heads"),
        ("vision", {"num_position_embeddings": 35}, "num_position_embeddings 35 is no square"),
    ],
)
def test_sizes_that_contradict_each_other_are_refused(
    tmp_path: Path, part: str, changes: dict[str, Any], message: str
) -> None:
    raw = json.loads((tiny_models.save(tmp_path, "moe") / "config.json").read_text())
    raw[f"{part}_config"] |= changes
    with pytest.raises(ValueError, match=f"config.json: .*{message}"):
        Qwen3VLConfig.from_dict(raw, "config.json")


def test_a_file_that_says_nothing_of_the_discriminator_is_shared(
    configs: dict[str, Qwen3VLConfig],
) -> None:
    assert not configs["moe"].dedicated and not configs["dense"].dedicated
    assert configs["moe"].value_heads == ("v_head.1.weight",)


@pytest.mark.parametrize(
    "kind, modules, message",
    [
        ("dense", ("moe",), "recompute.modules has moe, which a dense model does not have"),
        ("moe", ("core_attn", "mlp"), "has mlp, which a Mixture-of-Experts model does not"),
        ("dense", ("layernorm", "mlp"), "'cpu' can't recompute layernorm; choose from core_attn"),
    ],
)
def test_modules_that_can_not_be_recomputed_are_refused(
    configs: dict[str, Qwen3VLConfig], kind: str, modules: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        checks.check_recompute(
            configs[kind], Recompute("selective", modules), backends.create("cpu")
        )


@pytest.mark.parametrize(
    "kind, name, expert, dispatcher, message",
    [
        ("moe", "cpu", 2, "deepep", "'cpu' gathers all tokens on every rank, so leave it out"),
        ("moe", "cuda", 1, "hybridep", "but there are 4 experts at expert=1, expert_tensor=1"),
        ("dense", "cuda", 2, "deepep", "but there are 0 experts at expert=2, expert_tensor=1"),
    ],
)
def test_a_dispatcher_that_can_not_be_had_is_refused(
    configs: dict[str, Qwen3VLConfig],
    kind: str,
    name: str,
    expert: int,
    dispatcher: Any,
    message: str,
) -> None:
    dispatches = "allgather" if name == "cpu" else "alltoall"
    backend = replace(backends.create("cpu"), name=name, moe_dispatcher=dispatches)
    layout = Layout(expert=expert)
    checks.check_dispatcher(configs[kind], "alltoall", layout, backend)
    with pytest.raises(ValueError, match=message):
        checks.check_dispatcher(configs[kind], dispatcher, layout, backend)


@pytest.mark.parametrize("dispatcher", ["deepep", "hybridep"])
def test_a_dispatcher_that_is_not_installed_is_refused(dispatcher: Any) -> None:
    checks.check_installed("alltoall")
    with pytest.raises(ValueError, match=f"'{dispatcher}' needs DeepEP with .* install it from"):
        checks.check_installed(dispatcher)


def test_an_installed_dispatcher_reaches_megatron(configs: dict[str, Qwen3VLConfig]) -> None:
    backend = replace(backends.create("cpu"), name="cuda", moe_dispatcher="alltoall")
    layout = Layout(expert=2)
    checks.check_dispatcher(configs["moe"], "deepep", layout, backend)
    with mock.patch.object(checks, "HAVE_DEEP_EP", True):
        checks.check_installed("deepep")
    options = TrainingOptions(dispatcher="deepep")
    found = text_transformer_config(configs["moe"], layout, backend, options)
    assert found.moe_token_dispatcher_type == "flex"
    assert found.moe_flex_dispatcher_backend == "deepep"


@pytest.mark.parametrize(
    "layers, layout, recompute, message",
    [
        (1, Layout(pipeline=2), Recompute(), "offload_layers=1 with pipeline=2 and .*=none: Tr"),
        (1, Layout(), Recompute("full"), "pipeline=1 and recompute.granularity=full: Transformer"),
        (4, Layout(), Recompute(), "the last of 4 decoder layers .* set it to 3 or less"),
    ],
)
def test_layers_that_can_not_be_offloaded_are_refused(
    configs: dict[str, Qwen3VLConfig],
    layers: int,
    layout: Layout,
    recompute: Recompute,
    message: str,
) -> None:
    backend = replace(backends.create("cpu"), activation_offload=True)
    with pytest.raises(ValueError, match=message):
        checks.check_offload(configs["dense"], layers, layout, recompute, backend)
    checks.check_offload(configs["dense"], 0, layout, recompute, backend)


def test_layers_are_offloaded_from_a_device_alone(configs: dict[str, Qwen3VLConfig]) -> None:
    own = Layout(), Recompute(vision=True)
    cpu = backends.create("cpu")
    with pytest.raises(ValueError, match="offload_layers=3 moves .* backend 'cpu' has none"):
        checks.check_offload(configs["dense"], 3, *own, cpu)
    device = replace(cpu, activation_offload=True)
    checks.check_offload(configs["dense"], 3, *own, device)
    options = TrainingOptions(offload_layers=3)
    found = text_transformer_config(configs["dense"], Layout(), device, options)
    assert (found.cpu_offloading, found.cpu_offloading_num_layers) == (True, 3)
    assert not found.cpu_offloading_weights
    assert not text_transformer_config(
        configs["dense"], Layout(), device, TrainingOptions()
    ).cpu_offloading


FP8_BACKEND = replace(backends.create("cpu"), name="fp8", fp8=True)


@pytest.mark.parametrize(
    "precision, layout, modules, message",
    [
        (Precision(None, 1, 0), Layout(), (), "bf16_last_layers mean something with fp8 only"),
        (Precision(None, 0, 2), Layout(), (), "bf16_last_layers mean something with fp8 only"),
        (Precision("delayed", 1, 0), Layout(), (), "can't leave some in BF16; choose tensorwise"),
        (Precision("delayed", 0, 1), Layout(), (), "can't leave some in BF16; choose tensorwise"),
        (Precision(None, 0, 0, True), Layout(), (), "but fp8 is null; set fp8 to tensorwise"),
        (Precision("delayed", 0, 0, True), Layout(), (), "knows no scale to round by before the"),
        (Precision("delayed"), Layout(pipeline=2), (), r"\(pipeline=2\) reach with different"),
        (Precision("delayed"), Layout(), ("layernorm",), "has layernorm, whose outputs fp8='del"),
        (Precision("delayed"), Layout(), ("moe_act", "layernorm"), "has layernorm, moe_act, whose"),
        (
            Precision("tensorwise", 3, 1),
            Layout(pipeline=2),
            (),
            "bf16_first_layers=3, but a pipeline stage has 2 of 4 decoder layers",
        ),
        (Precision("blockwise", 0, 5), Layout(), (), "bf16_last_layers=5, but a pipeline stage"),
    ],
)
def test_a_precision_that_can_not_be_had_is_refused(
    configs: dict[str, Qwen3VLConfig],
    precision: Precision,
    layout: Layout,
    modules: tuple[str, ...],
    message: str,
) -> None:
    recompute = Recompute("selective", modules) if modules else Recompute()
    with pytest.raises(ValueError, match=message):
        precision.check(FP8_BACKEND, configs["moe"], layout, recompute)


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise"])
def test_fp8_needs_a_backend_that_has_it(configs: dict[str, Qwen3VLConfig], recipe: Any) -> None:
    own = configs["dense"], Layout(), Recompute()
    with pytest.raises(ValueError, match=f"fp8='{recipe}' needs .* backend 'cpu' has none"):
        Precision(recipe).check(backends.create("cpu"), *own)
    Precision(recipe).check(FP8_BACKEND, *own)
    Precision().check(backends.create("cpu"), *own)


def test_precision_lands_in_the_decoders_configuration(configs: dict[str, Qwen3VLConfig]) -> None:
    def decoder(precision: Precision) -> TransformerConfig:
        options = TrainingOptions(precision=precision)
        return text_transformer_config(configs["dense"], Layout(), FP8_BACKEND, options)

    found = decoder(Precision("tensorwise", 1, 2))
    assert (found.fp8, found.fp8_recipe) == ("hybrid", "tensorwise")
    assert found.first_last_layers_bf16
    assert (found.num_layers_at_start_in_bf16, found.num_layers_at_end_in_bf16) == (1, 2)
    assert not decoder(Precision("blockwise")).first_last_layers_bf16
    assert decoder(Precision("blockwise")).fp8_recipe == "blockwise"
    assert decoder(Precision("delayed")).fp8_amax_history_len == 1024
    assert decoder(Precision()).fp8 is None
    assert decoder(Precision("blockwise", param_gather=True)).fp8_param
    assert not decoder(Precision("blockwise")).fp8_param
