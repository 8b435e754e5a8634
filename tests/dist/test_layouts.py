"""Every layout computes what one rank computes: loss and the gradient of every parameter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from math import prod
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from model_providers import context, cpu_layers, image_shares, qwen3_vl
from model_providers.architecture import Qwen3VLConfig
from model_providers.config import Recompute, TrainingOptions
from model_providers.config import TextTransformerConfig as TextConfig
from model_providers.parallel import Layout
from model_providers.qwen3_vl import Head
from model_providers.vision import Grid, VisionModel
from model_providers.weight_map import GatedUp, Split
from prism_megatron.data.packing import pack
from prism_megatron.training import runner
from prism_megatron.types import PackedBatch
from tests.dist import checks
from tests.dist.hf_reference import distance
from tests.dist.ranks import Ranks

TOLERANCE = 1e-4
Worlds = Callable[[int], Ranks]
Gradients = tuple[float, float, dict[str, Tensor]]

TP2 = Layout(tensor=2)
TP2SP = Layout(tensor=2, sequence_parallel=True)
PP2 = Layout(pipeline=2)
DP = Layout()
TP2PP2 = Layout(tensor=2, pipeline=2)
TP2PP2SP = Layout(tensor=2, pipeline=2, sequence_parallel=True)
PP4 = Layout(pipeline=4)
EP2 = Layout(expert=2)
TP2EP2 = Layout(tensor=2, expert=2, sequence_parallel=True)
EP2PP2 = Layout(expert=2, pipeline=2)
CP2 = Layout(context=2)
CP2EP2 = Layout(context=2, expert=2)
CP2TP2SP = Layout(context=2, tensor=2, sequence_parallel=True)
ETP2 = Layout(expert_tensor=2)
TP2ETP2 = Layout(tensor=2, expert_tensor=2, sequence_parallel=True)
EP2ETP2 = Layout(expert=2, expert_tensor=2)
TP2EP2ETP2 = Layout(tensor=2, expert=2, expert_tensor=2, sequence_parallel=True)
TP2_TOWER = Layout(tensor=2, vision="replicated")
TP2SP_TOWER = Layout(tensor=2, sequence_parallel=True, vision="replicated")

DENSE = {
    "tp2": (2, TP2),
    "tp2-sp": (2, TP2SP),
    "pp2": (2, PP2),
    "dp2": (2, DP),
    "tp2-pp2": (4, TP2PP2),
    "tp2-pp2-sp": (4, TP2PP2SP),
    "tp2-sp-dp2": (4, TP2SP),
    "pp4": (4, PP4),
    "cp2": (2, CP2),
    "cp2-dp2": (4, CP2),
    "cp4": (4, Layout(context=4)),
    "cp2-pp2": (4, Layout(context=2, pipeline=2)),
    "cp2-tp2": (4, Layout(context=2, tensor=2)),
    "cp2-tp2-sp": (4, CP2TP2SP),
    # each tensor-parallel rank with the whole vision tower
    "tp2-tower": (2, TP2_TOWER),
    "tp2-sp-tower": (2, TP2SP_TOWER),
    "tp2-dp2-tower": (4, TP2_TOWER),
    "tp2-sp-dp2-tower": (4, TP2SP_TOWER),
    "tp2-pp2-tower": (4, replace(TP2PP2, vision="replicated")),
    "tp2-pp2-sp-tower": (4, replace(TP2PP2SP, vision="replicated")),
    "cp2-tp2-tower": (4, Layout(context=2, tensor=2, vision="replicated")),
    "cp2-tp2-sp-tower": (4, replace(CP2TP2SP, vision="replicated")),
}
EXPERTS = {
    "ep2": (2, EP2),
    "tp2-sp": (2, TP2SP),
    "dp2": (2, DP),
    "pp2": (2, PP2),
    "tp2-ep2-sp": (2, TP2EP2),
    "ep2-dp2": (4, EP2),
    "ep4": (4, Layout(expert=4)),
    "tp2-ep2-sp-dp2": (4, TP2EP2),
    "tp2-ep2-sp-dp2-tower": (4, replace(TP2EP2, vision="replicated")),
    "ep2-pp2": (4, EP2PP2),
    "etp2": (2, ETP2),
    "tp2-etp2-sp": (2, TP2ETP2),
    "ep2-etp2": (4, EP2ETP2),
    "tp2-ep2-etp2-sp": (4, TP2EP2ETP2),
    "cp2": (2, CP2),
    "cp2-ep2": (2, CP2EP2),
    "cp2-ep2-dp2": (4, CP2EP2),
    "cp2-ep4": (4, Layout(context=2, expert=4)),
    "cp2-tp2-sp": (4, CP2TP2SP),
    "cp2-tp2-ep2-sp": (4, Layout(context=2, tensor=2, expert=2, sequence_parallel=True)),
    "cp2-pp2": (4, Layout(context=2, pipeline=2)),
}
COUNTED = {"embedding_as_layer": True, "loss_as_layer": True}
# six layers and three deepstack features, which have to cross from stage to stage
DEEP = {
    "pp2-first1": (2, Layout(pipeline=2, first_stage_layers=1)),
    "pp2-last1": (2, Layout(pipeline=2, first_stage_layers=5, last_stage_layers=1)),
    "pp4-counted": (4, Layout(pipeline=4, **COUNTED)),
    "pp2-first2-tp2-sp": (
        4,
        Layout(tensor=2, pipeline=2, first_stage_layers=2, sequence_parallel=True),
    ),
    "pp2-vpp3": (2, Layout(pipeline=2, virtual_pipeline=3)),
    "pp2-vpp2-counted": (2, Layout(pipeline=2, virtual_pipeline=2, **COUNTED)),
    "pp2-vpp2-first2": (2, Layout(pipeline=2, virtual_pipeline=2, first_stage_layers=2)),
    "pp4-vpp2-counted": (4, Layout(pipeline=4, virtual_pipeline=2, **COUNTED)),
    "pp2-vpp3-dp2": (4, Layout(pipeline=2, virtual_pipeline=3)),
    "pp2-vpp3-tp2-sp": (
        4,
        Layout(tensor=2, pipeline=2, virtual_pipeline=3, sequence_parallel=True),
    ),
    "cp2-pp2-vpp3": (4, Layout(context=2, pipeline=2, virtual_pipeline=3)),
    "ep2-pp2-vpp3": (4, Layout(expert=2, pipeline=2, virtual_pipeline=3)),
}


@pytest.fixture(scope="module")
def one_rank(
    ranks: Worlds, hf_models: dict[str, Path]
) -> Callable[[str, Head, dict[str, Any]], Gradients]:
    """What one rank computes; each question is answered once."""
    known: dict[str, Gradients] = {}

    def get(kind: str, head: Head, options: dict[str, Any]) -> Gradients:
        key = repr((kind, head, options))
        if key not in known:
            [known[key]] = ranks(1).run(_gradients, hf_models[kind], DP, head, options)
        return known[key]

    return get


OneRank = Callable[[str, Head, dict[str, Any]], Gradients]


def _gradients(path: Path, layout: Layout, head: Head, options: dict[str, Any]) -> Gradients:
    return checks.gradients(path, layout, head, **options)


def _compare(found: list[Gradients], wanted: Gradients) -> None:
    losses = {(loss, aux) for loss, aux, _ in found}
    assert len(losses) == 1, f"ranks report different losses: {losses}"
    loss, aux, gradients = found[0]
    assert loss == pytest.approx(wanted[0], rel=1e-5)
    assert aux == pytest.approx(wanted[1], rel=1e-5)
    assert set(gradients) == set(wanted[2])
    wrong = {
        name: distance(gradients[name], gradient)
        for name, gradient in wanted[2].items()
        if distance(gradients[name], gradient) > TOLERANCE
    }
    assert not wrong, wrong


@pytest.mark.parametrize(
    "kind, layout",
    [("dense", layout) for layout in DENSE]
    # where the shared embedding is split, or on two stages
    + [("tied", layout) for layout in ("tp2", "tp2-sp", "pp2", "pp4", "tp2-pp2-sp", "cp2-pp2")],
)
def test_dense_layouts_equal_one_rank(
    ranks: Worlds, hf_models: dict[str, Path], one_rank: OneRank, kind: str, layout: str
) -> None:
    world, split = DENSE[layout]
    found = ranks(world).run(_gradients, hf_models[kind], split, "language", {})
    _compare(found, one_rank(kind, "language", {}))


@pytest.mark.parametrize("layout", [name for name in DEEP if "ep" not in name])
def test_stages_of_any_size_equal_one_rank(
    ranks: Worlds, hf_models: dict[str, Path], one_rank: OneRank, layout: str
) -> None:
    world, split = DEEP[layout]
    # six micro-batches or more, text only among them
    small = {"micro_batch_tokens": 24}
    found = ranks(world).run(_gradients, hf_models["deep"], split, "language", small)
    _compare(found, one_rank("deep", "language", {}))


@pytest.mark.parametrize("layout", ["pp4-counted", "pp2-vpp3", "pp4-vpp2-counted", "ep2-pp2-vpp3"])
def test_stages_of_experts_equal_one_rank(
    ranks: Worlds, hf_models: dict[str, Path], one_rank: OneRank, layout: str
) -> None:
    world, split = DEEP[layout]
    aux = TrainingOptions(aux_loss_coef=100.0)
    options: dict[str, Any] = {"training": aux, "micro_batch_tokens": 24}
    found = ranks(world).run(_gradients, hf_models["deep-moe"], split, "score", options)
    _compare(found, one_rank("deep-moe", "score", options))


@pytest.mark.parametrize("layout", ["tp2-sp", "tp2-sp-tower", "pp2", "dp2", "cp2"])
def test_videos_equal_one_rank(
    ranks: Worlds, hf_models: dict[str, Path], one_rank: OneRank, layout: str
) -> None:
    world, split = DENSE[layout]
    options = {"shown": "videos"}
    found = ranks(world).run(_gradients, hf_models["dense"], split, "language", options)
    _compare(found, one_rank("dense", "language", options))


@pytest.mark.parametrize("layout", EXPERTS)
def test_discriminator_layouts_equal_one_rank(
    ranks: Worlds, hf_models: dict[str, Path], one_rank: OneRank, layout: str
) -> None:
    world, split = EXPERTS[layout]
    found = ranks(world).run(_gradients, hf_models["moe"], split, "score", {})
    _compare(found, one_rank("moe", "score", {}))


@pytest.mark.parametrize("tokens", [24, 33])
@pytest.mark.parametrize(
    "layout",
    [
        "dp1",
        "ep2",
        "tp2-sp",
        "dp2",
        "pp2",
        "tp2-ep2-sp",
        "etp2",
        "tp2-etp2-sp",
        "cp2",
        "cp2-ep2",
        "cp2-tp2-sp",
    ],
)
def test_router_loss_does_not_depend_on_layout_or_micro_batches(
    ranks: Worlds, hf_models: dict[str, Path], one_rank: OneRank, layout: str, tokens: int
) -> None:
    """One rank has all tokens in one micro-batch, these up to six of them."""
    world, split = (EXPERTS | {"dp1": (1, DP)})[layout]
    aux: dict[str, Any] = {"training": TrainingOptions(aux_loss_coef=500.0)}
    wanted = one_rank("moe", "score", aux | {"micro_batch_tokens": 4096})
    small = aux | {"micro_batch_tokens": tokens}
    _compare(ranks(world).run(_gradients, hf_models["moe"], split, "score", small), wanted)
    without = one_rank("moe", "score", {})[2]
    routers = [name for name in without if name.endswith("mlp.gate.weight")]
    assert min(distance(without[name], wanted[2][name]) for name in routers) > 1e-2


def _deeper_after_shallower(shallow: Path, deep: Path) -> tuple[float, float]:
    """The router loss of a model with six layers, before and after one with four trained."""
    training = TrainingOptions(aux_loss_coef=500.0)
    before, _, after = (
        checks.gradients(path, Layout(), "score", training=training)[1]
        for path in (deep, shallow, deep)
    )
    return before, after


def test_models_of_different_depth_train_in_one_process(
    ranks: Worlds, hf_models: dict[str, Path]
) -> None:
    """As a discriminator and a policy with experts do."""
    paths = hf_models["moe"], hf_models["deep-moe"]
    before, after = ranks(1).run(_deeper_after_shallower, *paths)[0]
    assert before == after > 0


ROUTER = TrainingOptions(aux_loss_coef=500.0, z_loss_coef=50.0)


def _padded(path: Path, layout: Layout) -> Gradients:
    """Rows filled up to 240 tokens, of which 90 are real."""

    def padded(*args: Any, **options: Any) -> PackedBatch:
        return pack(*args, **(options | {"pad_to": 240}))

    with mock.patch.object(runner, "pack", padded):
        return checks.gradients(path, layout, "score", training=ROUTER, micro_batch_tokens=4096)


@pytest.mark.parametrize(
    "world, layout", [(1, DP), (2, DP), (2, TP2SP), (2, CP2)], ids=["1", "dp2", "tp2", "cp2"]
)
def test_padding_does_not_change_the_routers_losses(
    ranks: Worlds, hf_models: dict[str, Path], world: int, layout: Layout
) -> None:
    """Of two sequence-parallel ranks the second one has nothing but padding."""
    options = {"training": ROUTER, "micro_batch_tokens": 4096}
    wanted = ranks(world).run(_gradients, hf_models["moe"], layout, "score", options)[0]
    _compare(ranks(world).run(_padded, hf_models["moe"], layout), wanted)


@pytest.mark.parametrize(
    "layout", ["ep2", "tp2-sp", "dp2", "pp2", "tp2-ep2-sp", "cp2", "cp2-tp2-sp"]
)
def test_z_loss_does_not_depend_on_layout_or_micro_batches(
    ranks: Worlds, hf_models: dict[str, Path], one_rank: OneRank, layout: str
) -> None:
    world, split = EXPERTS[layout]
    option = {"training": TrainingOptions(z_loss_coef=50.0)}
    wanted = one_rank("moe", "score", option | {"micro_batch_tokens": 4096})
    found = ranks(world).run(_gradients, hf_models["moe"], split, "score", option)
    _compare(found, wanted)
    without = one_rank("moe", "score", {})[2]
    routers = [name for name in without if name.endswith("mlp.gate.weight")]
    assert min(distance(without[name], wanted[2][name]) for name in routers) > 1e-2


FULL = Recompute("full", vision=True)
SOME_LAYERS = Recompute("full", layers=1)
MODULES = {
    "dense": Recompute("selective", ("core_attn", "mlp")),
    "moe": Recompute("selective", ("core_attn", "moe")),
}


def _forwards(path: Path, head: Head, recompute: Recompute) -> tuple[Gradients, dict[str, int]]:
    """Gradients, and how often each kind of module ran in training."""
    counts: Counter[str] = Counter()

    def count(module: nn.Module, inputs: object, output: object) -> None:
        if not module.training:
            return
        text = getattr(module, "causal", isinstance(getattr(module, "config", 0), TextConfig))
        counts[f"{'text' if text else 'vision'} {type(module).__name__}"] += 1

    handle = register_module_forward_hook(count)
    try:
        training = replace(ROUTER, recompute=recompute)
        found = checks.gradients(path, DP, head, training=training)
    finally:
        handle.remove()
    return found, counts


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_recompute_runs_what_it_says_again_and_changes_nothing(
    ranks: Worlds, hf_models: dict[str, Path], kind: str
) -> None:
    head: Head = "score" if kind == "moe" else "language"
    wanted, once = ranks(1).run(_forwards, hf_models[kind], head, Recompute())[0]
    layer = "text SectionRouter" if kind == "moe" else "text MLP"
    shown = ["text DeepstackLayer", "text PackedAttention", layer, "vision TransformerLayer"]
    for recompute, factors in (
        (FULL, [2, 2, 2, 2]),
        (SOME_LAYERS, [1.25, 1.25, 1.25, 1]),
        (MODULES[kind], [1, 2, 2, 1]),
    ):
        found, counts = ranks(1).run(_forwards, hf_models[kind], head, recompute)[0]
        _compare([found], wanted)
        assert [counts[name] / once[name] for name in shown] == factors, recompute


@pytest.mark.parametrize(
    "kind, layout",
    [
        ("dense", "tp2-sp"),
        ("dense", "pp2"),
        ("moe", "tp2-sp"),
        ("moe", "pp2"),
        ("moe", "tp2-ep2-sp"),
        ("dense", "cp2"),
        ("moe", "cp2"),
    ],
)
def test_recompute_changes_nothing_at_other_layouts(
    ranks: Worlds, hf_models: dict[str, Path], one_rank: OneRank, kind: str, layout: str
) -> None:
    head: Head = "score" if kind == "moe" else "language"
    world, split = EXPERTS[layout]
    for recompute in (FULL, MODULES[kind]):
        options = {"training": TrainingOptions(recompute=recompute)}
        found = ranks(world).run(_gradients, hf_models[kind], split, head, options)
        _compare(found, one_rank(kind, head, {}))


@pytest.mark.parametrize("layout", ["tp2-sp", "tp2-sp-tower", "pp2"])
def test_recompute_with_a_frozen_decoder_still_trains_the_tower(
    ranks: Worlds, hf_models: dict[str, Path], one_rank: OneRank, layout: str
) -> None:
    """Its gradients come through recomputed layers that have nothing to train themselves."""
    world, split = DENSE[layout]
    options = {"freeze": ("language",), "training": TrainingOptions(recompute=FULL)}
    found = ranks(world).run(_gradients, hf_models["dense"], split, "language", options)
    _compare(found, one_rank("dense", "language", {"freeze": ("language",)}))


@pytest.mark.parametrize("frozen", checks.FREEZES, ids="+".join)
@pytest.mark.parametrize("layout", ["tp2-sp", "tp2-tower", "pp2", "cp2"])
def test_frozen_parts_leave_the_other_gradients_alone(
    ranks: Worlds,
    hf_models: dict[str, Path],
    one_rank: OneRank,
    layout: str,
    frozen: tuple[str, ...],
) -> None:
    """Tied embeddings, so that at two stages the last one's copy is frozen with the first's."""
    world, split = DENSE[layout]
    loss, aux, full = one_rank("tied", "language", {})
    found = ranks(world).run(_gradients, hf_models["tied"], split, "language", {"freeze": frozen})
    kept = {name: found[0][2].pop(name) for name in full if checks.part_of(name) in frozen}
    assert all(float(gradient.abs().max()) == 0 for gradient in kept.values())
    trained = {name: gradient for name, gradient in full.items() if name not in kept}
    _compare(found, (loss, aux, trained))


@pytest.mark.parametrize("tokens", [24, 33, 4096])
@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_micro_batch_size_does_not_matter(
    ranks: Worlds, hf_models: dict[str, Path], one_rank: OneRank, kind: str, tokens: int
) -> None:
    head: Head = "score" if kind == "moe" else "language"
    found = one_rank(kind, head, {"micro_batch_tokens": tokens})
    _compare([found], one_rank(kind, head, {}))


def _without_the_sum_over_tensor_ranks(path: Path) -> Gradients:
    with mock.patch.object(
        qwen3_vl.tensor_parallel,
        "copy_to_tensor_model_parallel_region",
        lambda features, group: features,
    ):
        return checks.gradients(path, TP2SP)


def test_the_comparison_sees_features_that_are_only_sliced(
    ranks: Worlds, hf_models: dict[str, Path], one_rank: OneRank
) -> None:
    """A plain slice under sequence parallelism keeps the loss and loses half of the gradient."""
    wanted = one_rank("dense", "language", {})
    loss, _, gradients = ranks(2).run(_without_the_sum_over_tensor_ranks, hf_models["dense"])[0]
    assert loss == pytest.approx(wanted[0], rel=1e-5)
    name = "model.visual.deepstack_merger_list.1.linear_fc2.weight"
    assert distance(gradients[name], wanted[2][name]) > 1e-2


def _with_the_other_backward(path: Path, name: str) -> Gradients:
    """Gradients of a gather that are summed over the ranks where they should not be, or not summed
    where they should."""
    module = import_module(name)
    gather = module.gather_from_sequence_parallel_region

    def flipped(
        values: Tensor, tensor_parallel_output_grad: bool = True, group: Any = None
    ) -> Tensor:
        return gather(
            values, tensor_parallel_output_grad=not tensor_parallel_output_grad, group=group
        )

    with mock.patch.object(module, "gather_from_sequence_parallel_region", flipped):
        return checks.gradients(path, CP2)


@pytest.mark.parametrize(
    "module, name",
    [
        (context, "lm_head.weight"),
        (cpu_layers, "model.language_model.layers.2.self_attn.v_proj.weight"),
    ],
    ids=["head", "keys and values"],
)
def test_the_comparison_sees_a_gather_with_the_wrong_backward(
    ranks: Worlds, hf_models: dict[str, Path], one_rank: OneRank, module: ModuleType, name: str
) -> None:
    wanted = one_rank("dense", "language", {})
    loss, _, gradients = ranks(2).run(
        _with_the_other_backward, hf_models["dense"], module.__name__
    )[0]
    assert loss == pytest.approx(wanted[0], rel=1e-5)
    assert distance(gradients[name], wanted[2][name]) > 1e-2


def _without_features_in_the_payload(path: Path) -> Gradients:
    with mock.patch.object(Qwen3VLConfig, "deepstack_left", lambda self, layers: 0):
        return checks.gradients(path, DEEP["pp2-vpp3"][1])


def test_the_comparison_sees_features_that_stay_behind(
    ranks: Worlds, hf_models: dict[str, Path], one_rank: OneRank
) -> None:
    loss = ranks(2).run(_without_features_in_the_payload, hf_models["deep"])[0][0]
    assert abs(loss - one_rank("deep", "language", {})[0]) > 1e-2


Vision = tuple[list[list[int]], list[int]]
"""Of one rank, in each micro-batch where there are some: patches of each image that it encodes, and
rows of features that it gets from an exchange."""


SPREAD = {"shown": "spread"}


def _spread(
    path: Path, layout: Layout, head: Head, options: dict[str, Any]
) -> tuple[Gradients, Vision]:
    """Gradients with the images where checks.SPREAD has them."""
    encode, exchange = VisionModel.forward, qwen3_vl.exchange
    encoded, received = [], []

    def count(model: VisionModel, pixels: Tensor, grids: list[Grid]) -> Tensor:
        encoded.append([prod(grid) for grid in grids])
        return encode(model, pixels, grids)

    def measure(*args: Any) -> Tensor:
        features = exchange(*args)
        assert features.requires_grad == ("vision" not in options.get("freeze", ()))
        received.append(features.shape[1])
        return features

    plan = checks.SPREAD[layout.data(dist.get_world_size())]
    with (
        mock.patch.object(runner, "plan_micro_batches", lambda *args, **options: plan),
        mock.patch.object(VisionModel, "forward", count),
        mock.patch.object(qwen3_vl, "exchange", measure),
    ):
        found = checks.gradients(path, layout, head, **options)
    return found, (encoded, received)


DP2_VISION = [([[16], [24], [4]], [5, 6, 0]), ([[4], [24]], [0, 6, 7])]
DP4_VISION = [
    ([[16], [24], [4]], [5, 6, 0]),
    ([[4]], [0, 6, 0]),
    ([[24]], [0, 0, 7]),
    ([], [0, 0, 0]),
]
# the first rank of two has the first and the last quarter of each sequence, so that the last
# micro-batch has an image for either and nothing travels
CP2_DP2_VISION = [
    ([[16], [24]], [4, 6]),
    ([[4]], [5, 6]),
    ([[4]], [0, 6]),
    ([[24]], [0, 6]),
]
# two tensor-parallel ranks show what their row shows, and encode different images of it
TOWERS_VISION = [
    ([[16], [24]], [5, 6, 0]),
    ([[4]], [5, 6, 0]),
    ([[24]], [0, 6, 7]),
    ([[4]], [0, 6, 7]),
]


@pytest.mark.parametrize(
    "world, layout, vision",
    [
        (2, DP, DP2_VISION),
        (4, DP, DP4_VISION),
        (4, TP2SP, [DP2_VISION[0]] * 2 + [DP2_VISION[1]] * 2),
        (4, Layout(pipeline=2, virtual_pipeline=2), [*DP2_VISION, ([], []), ([], [])]),
        (4, CP2, CP2_DP2_VISION),
        (4, TP2_TOWER, TOWERS_VISION),
        (4, TP2SP_TOWER, TOWERS_VISION),
    ],
    ids=[
        "dp2",
        "dp4",
        "tp2-sp-dp2",
        "pp2-vpp2-dp2",
        "cp2-dp2",
        "tp2-dp2-tower",
        "tp2-sp-dp2-tower",
    ],
)
def test_each_image_is_encoded_once_and_its_features_go_where_it_is_shown(
    ranks: Worlds,
    hf_models: dict[str, Path],
    one_rank: OneRank,
    world: int,
    layout: Layout,
    vision: list[Vision],
) -> None:
    answers = ranks(world).run(_spread, hf_models["dense"], layout, "language", SPREAD)
    _compare([found for found, _ in answers], one_rank("dense", "language", SPREAD))
    assert [counted for _, counted in answers] == vision


@pytest.mark.parametrize(
    "kind, layout, options",
    [
        ("dense", "dp2", {"freeze": ("vision", "mergers")}),
        ("dense", "dp2", {"shown": "text"}),
        ("dense", "tp2-dp2-tower", {"freeze": ("vision", "mergers")}),
        ("dense", "tp2-dp2-tower", {"shown": "text"}),
        ("dense", "tp2-sp-dp2-tower", {"freeze": ("language",), "recompute": True}),
        ("dense", "cp2-dp2", {"freeze": ("language",), "recompute": True}),
        # other ranks' tokens ask this rank's experts for gradients, whatever its own row shows
        ("moe", "ep2", {"freeze": ("language",)}),
        ("moe", "ep2", {"shown": "text", "freeze": ("language",)}),
        ("moe", "tp2-ep2-sp-dp2-tower", {"freeze": ("language",)}),
    ],
)
def test_ranks_without_images_neither_wait_nor_dilute_gradients(
    ranks: Worlds,
    hf_models: dict[str, Path],
    one_rank: OneRank,
    kind: str,
    layout: str,
    options: dict[str, Any],
) -> None:
    head: Head = "score" if kind == "moe" else "language"
    world, split = (DENSE | EXPERTS)[layout]
    same = SPREAD | {k: v for k, v in options.items() if k != "recompute"}
    training = TrainingOptions(recompute=FULL if "recompute" in options else Recompute())
    answers = ranks(world).run(_spread, hf_models[kind], split, head, same | {"training": training})
    _compare([found for found, _ in answers], one_rank(kind, head, same))


def _without_the_gradients_of_other_ranks(path: Path) -> Gradients:
    exchange = image_shares.all_to_all

    def own(group: Any, sent: Tensor, receive: list[int], send: list[int]) -> Tensor:
        def keep(gradient: Tensor) -> Tensor:
            ranks = torch.repeat_interleave(torch.tensor(send))
            return gradient * (ranks == group.rank())[:, None, None]

        sent.register_hook(keep)
        return exchange(group, sent, receive, send)

    with mock.patch.object(image_shares, "all_to_all", own):
        return _spread(path, DP, "language", SPREAD)[0]


@pytest.mark.parametrize("name", ["deepstack_merger_list.1.linear_fc2.weight", "pos_embed.weight"])
def test_the_comparison_sees_an_exchange_without_the_gradients_of_other_ranks(
    ranks: Worlds, hf_models: dict[str, Path], one_rank: OneRank, name: str
) -> None:
    wanted = one_rank("dense", "language", SPREAD)
    loss, _, gradients = ranks(2).run(_without_the_gradients_of_other_ranks, hf_models["dense"])[0]
    assert loss == pytest.approx(wanted[0], rel=1e-5)
    name = f"model.visual.{name}"
    assert distance(gradients[name], wanted[2][name]) > 1e-2


def _with_another_sum_over_towers(path: Path, layout: Layout, left_out: str) -> Gradients:
    """Gradients of a tower each of whose copies keeps its own, or is told of every image by two
    tensor-parallel ranks that have the same gradient."""
    without = {
        "sum": mock.patch.object(runner, "_sum_over_encoders", lambda model: None),
        "choice": mock.patch.object(qwen3_vl.Qwen3VLChunk, "_repeats_gradients", False),
    }
    with without[left_out]:
        return checks.gradients(path, layout)


@pytest.mark.parametrize(
    "layout, left_out", [(TP2_TOWER, "sum"), (TP2SP_TOWER, "sum"), (TP2_TOWER, "choice")]
)
def test_the_comparison_sees_towers_that_are_not_summed_or_told_twice(
    ranks: Worlds,
    hf_models: dict[str, Path],
    one_rank: OneRank,
    layout: Layout,
    left_out: str,
) -> None:
    wanted = one_rank("dense", "language", {})
    found = ranks(2).run(_with_another_sum_over_towers, hf_models["dense"], layout, left_out)
    assert found[0][0] == pytest.approx(wanted[0], rel=1e-5)
    name = "model.visual.deepstack_merger_list.1.linear_fc2.weight"
    assert distance(found[0][2][name], wanted[2][name]) > 1e-2


def _with_gate_and_up_in_one_piece(path: Path) -> Gradients:
    with mock.patch.object(GatedUp, "shards", Split.shards):
        return checks.gradients(path, TP2)


def test_the_comparison_sees_a_gated_layer_that_is_split_in_one_piece(
    ranks: Worlds, hf_models: dict[str, Path], one_rank: OneRank
) -> None:
    loss = ranks(2).run(_with_gate_and_up_in_one_piece, hf_models["dense"])[0][0]
    assert abs(loss - one_rank("dense", "language", {})[0]) > 1e-2
