"""The model equals transformers in fp32: logits, loss, every gradient, and every piece of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import load_balancing_loss_func

from model_providers import vision
from model_providers.config import TrainingOptions
from model_providers.packed import packed_seq_params
from model_providers.parallel import Layout
from model_providers.qwen3_vl import Qwen3VLModel, mrope_angles
from prism_megatron.data.packing import pack
from tests.dist import checks, hf_reference
from tests.dist.hf_reference import distance
from tests.dist.ranks import Ranks
from tests.tiny_models import EXPERTS, IMAGE, VIDEO

TOLERANCE = 1e-4
Worlds = Callable[[int], Ranks]

GRIDS = [(1, 4, 6), (1, 8, 2), (3, 2, 4), (1, 2, 2)]
"""Wide, tall, a video of three frames, one token; none has the size of the table of positions."""


def _worst(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> tuple[str, float]:
    assert set(found) == set(wanted), set(found) ^ set(wanted)
    return max(((name, distance(found[name], wanted[name])) for name in wanted), key=lambda x: x[1])


def _models(path: Path) -> tuple[Qwen3VLModel, PreTrainedModel]:
    return checks.make_runner(path, Layout()).model, hf_reference.load(path)


def _logits(path: Path, shown: str) -> list[float]:
    model, reference = _models(path)
    sequences = checks.BATCHES[shown]()
    batch = pack(
        sequences,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        merge_size=2,
        pad_id=0,
        pad_multiple=8,
    )
    model.eval()
    with torch.no_grad():
        packed = model(batch, output="logits")
        return [
            distance(packed[first:last], hf_reference.logits(reference, sequence))
            for sequence, first, last in zip(
                sequences, batch.cu_seqlens.tolist(), batch.cu_seqlens.tolist()[1:], strict=False
            )
        ]


KINDS = pytest.mark.parametrize(
    "kind, shown",
    [("dense", "images"), ("tied", "images"), ("moe", "images"), ("dense", "videos")],
)


@KINDS
def test_logits_of_a_packed_row_equal_transformers_one_by_one(
    ranks: Worlds, hf_models: dict[str, Path], kind: str, shown: str
) -> None:
    [distances] = ranks(1).run(_logits, hf_models[kind], shown)
    assert len(distances) == len(checks.BATCHES[shown]())
    assert max(distances) <= TOLERANCE, distances


def _loss_and_gradients(path: Path, shown: str) -> tuple[float, float, tuple[str, float]]:
    # a row holds all of them, so that images and videos meet in one
    loss, _, found = checks.gradients(path, Layout(), shown=shown, micro_batch_tokens=4096)
    reference, sequences = hf_reference.load(path), checks.BATCHES[shown]()
    tokens = float(sum(s.response_mask.sum() for s in sequences))
    wanted_loss = 0.0
    for sequence in sequences:
        part = hf_reference.loss(hf_reference.logits(reference, sequence), sequence, tokens)
        part.backward()
        wanted_loss += float(part)
    wanted = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    assert set(wanted) == {name for name, _ in reference.named_parameters()}
    return loss, wanted_loss, _worst(found, wanted)


@KINDS
def test_loss_and_every_gradient_equal_transformers(
    ranks: Worlds, hf_models: dict[str, Path], kind: str, shown: str
) -> None:
    [(loss, wanted_loss, (name, worst))] = ranks(1).run(_loss_and_gradients, hf_models[kind], shown)
    assert loss == pytest.approx(wanted_loss, rel=1e-5)
    assert worst <= TOLERANCE, name


def _vision_features(path: Path) -> list[float]:
    model, reference = _models(path)
    grid = torch.tensor(GRIDS)
    pixels = torch.randn(int(grid.prod(1).sum()), checks.PATCH_DIM)
    with torch.no_grad():
        found = model.vision_model(pixels, GRIDS)
        wanted = reference.model.visual(pixels, grid_thw=grid)
    rows = [wanted.pooler_output, *wanted.deepstack_features]
    return [distance(own, row) for own, row in zip(found, rows, strict=True)]


def test_vision_tower_equals_transformers_with_a_video_among_images(
    ranks: Worlds, hf_models: dict[str, Path]
) -> None:
    [distances] = ranks(1).run(_vision_features, hf_models["dense"])
    assert len(distances) == 4
    assert max(distances) <= 1e-5, distances


def _frames_alone(path: Path) -> float:
    model = checks.make_runner(path, Layout()).model
    pixels = torch.randn(3 * 8, checks.PATCH_DIM)
    with torch.no_grad():
        video = model.vision_model(pixels, [(3, 2, 4)])
        pixels[8:16] = 0
        changed = model.vision_model(pixels, [(3, 2, 4)])
    others = [0, 1, 4, 5]
    assert not torch.equal(video[:, 2:4], changed[:, 2:4])
    return float((video - changed)[:, others].abs().max())


def test_a_frame_attends_to_itself_only(ranks: Worlds, hf_models: dict[str, Path]) -> None:
    assert ranks(1).run(_frames_alone, hf_models["dense"]) == [0.0]


def _vision_positions(path: Path) -> tuple[float, float]:
    model, reference = _models(path)
    tower, visual, grid = model.vision_model, reference.model.visual, torch.tensor(GRIDS)
    with torch.no_grad():
        corners, weights, coordinates = tower._patches(GRIDS)
        wanted = visual.fast_pos_embed_interpolate(grid)
        learned = distance(tower._positions(corners, weights), wanted)
        half = visual.rot_pos_emb(grid)
        rotary = distance(tower._rotary(coordinates).flatten(1), torch.cat([half, half], dim=-1))
    return learned, rotary


def test_vision_positions_equal_transformers(ranks: Worlds, hf_models: dict[str, Path]) -> None:
    [(learned, rotary)] = ranks(1).run(_vision_positions, hf_models["dense"])
    assert learned <= 1e-6
    assert rotary <= 1e-6


def _on_a_device_that_can_not_be_read(path: Path) -> tuple[str, str, int]:
    tower = checks.make_runner(path, Layout()).model.vision_model
    tower.backend = replace(tower.backend, device=torch.device("meta"))
    tower.pos_embed.to("meta")
    corners, weights, coordinates = tower._patches(GRIDS)
    learned, angles = tower._positions(corners, weights), tower._rotary(coordinates)
    cu_seqlens = torch.tensor([0, 4, 9], dtype=torch.int32)
    packed = packed_seq_params(cu_seqlens, angles, tower.backend)
    return learned.device.type, packed.cu_seqlens_q.device.type, packed.max_seqlen_q


def test_no_forward_waits_for_the_device(ranks: Worlds, hf_models: dict[str, Path]) -> None:
    """On "meta" every read of a value fails."""
    found = ranks(1).run(_on_a_device_that_can_not_be_read, hf_models["dense"])
    assert found == [("meta", "meta", 5)]


def _text_angles(path: Path) -> tuple[float, float]:
    model, reference = _models(path)
    positions = torch.randint(0, 3000, (3, 29))
    cos, sin = reference.model.language_model.rotary_emb(torch.zeros(1, 29, 1), positions[:, None])
    angles = mrope_angles(model.architecture, positions).flatten(1)
    return float((angles.cos() - cos[0]).abs().max()), float((angles.sin() - sin[0]).abs().max())


def test_text_angles_equal_transformers(ranks: Worlds, hf_models: dict[str, Path]) -> None:
    [found] = ranks(1).run(_text_angles, hf_models["dense"])
    # an angle of 3000 has its last fp32 bit at 2e-4
    assert max(found) <= 5e-4


def _mergers(path: Path) -> tuple[list[float], list[float]]:
    model, reference = _models(path)
    tower, visual = model.vision_model, reference.model.visual
    hidden = torch.randn(12, 48) * 2
    own = [tower.merger, *tower.deepstack_merger_list]
    with torch.no_grad():
        wanted = [merger(hidden) for merger in (visual.merger, *visual.deepstack_merger_list)]
        exact = [distance(merger(hidden), w) for merger, w in zip(own, wanted, strict=True)]
        with mock.patch.object(vision.F, "gelu", partial(functional.gelu, approximate="tanh")):
            rough = [distance(merger(hidden), w) for merger, w in zip(own, wanted, strict=True)]
    return exact, rough


def test_patch_mergers_use_the_exact_gelu(ranks: Worlds, hf_models: dict[str, Path]) -> None:
    [(exact, rough)] = ranks(1).run(_mergers, hf_models["dense"])
    assert max(exact) <= 2e-6, exact
    assert min(rough) >= 5e-5, rough


def _router_loss(path: Path, z_loss: bool) -> tuple[float, float, tuple[str, float]]:
    """One of the router's losses and the gradient of it alone: with it minus without it."""
    coefficient = 10.0
    training = TrainingOptions(**{"z_loss_coef" if z_loss else "aux_loss_coef": coefficient})
    plain = checks.gradients(path, Layout(), micro_batch_tokens=4096)[2]
    _, found, total = checks.gradients(path, Layout(), micro_batch_tokens=4096, training=training)
    reference = hf_reference.load(path)
    layers: dict[int, list[Tensor]] = {}
    for i, layer in enumerate(reference.model.language_model.layers):
        layer.mlp.gate.register_forward_hook(
            lambda module, args, out, i=i: layers.setdefault(i, []).append(out[0])
        )
    for sequence in checks.mixed_batch():
        hf_reference.logits(reference, sequence)
    loss = _squared_logsumexp if z_loss else _load_balancing
    wanted = torch.stack([loss(torch.cat(logits)) for logits in layers.values()]).mean()
    (coefficient * wanted).backward()
    gates = {
        name: p.grad for name, p in reference.named_parameters() if name.endswith("mlp.gate.weight")
    }
    own = {name: total[name] - plain[name] for name in gates}
    return found, float(wanted), _worst(own, gates)


def _load_balancing(logits: Tensor) -> Tensor:
    experts, top_k = EXPERTS["num_experts"], EXPERTS["num_experts_per_tok"]
    return load_balancing_loss_func((logits,), experts, top_k)


def _squared_logsumexp(logits: Tensor) -> Tensor:
    return logits.logsumexp(-1).square().mean()


def test_router_loss_is_transformers_mean_over_layers(
    ranks: Worlds, hf_models: dict[str, Path]
) -> None:
    [(found, wanted, (name, worst))] = ranks(1).run(_router_loss, hf_models["moe"], False)
    assert found == pytest.approx(wanted, rel=1e-5)
    assert worst <= 1e-3, name


def test_z_loss_is_the_mean_square_of_the_routers_logsumexp(
    ranks: Worlds, hf_models: dict[str, Path]
) -> None:
    [(_, _, (name, worst))] = ranks(1).run(_router_loss, hf_models["moe"], True)
    assert worst <= 1e-3, name
