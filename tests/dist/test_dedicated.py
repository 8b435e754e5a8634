"""The discriminator whose experts and heads are divided between the sections that it judges."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import (
    Qwen3VLMoeTextTopKRouter,
    load_balancing_loss_func,
)

from model_providers import qwen3_vl
from model_providers.architecture import SECTIONS, Qwen3VLConfig
from model_providers.config import TextTransformerConfig, TrainingOptions
from model_providers.parallel import Layout
from model_providers.router import router_mask
from prism_megatron.training import discriminator
from tests.dist import checks, hf_reference
from tests.dist.hf_reference import distance
from tests.dist.ranks import Ranks
from tests.tiny_models import DEDICATED

TOLERANCE = 1e-4
AUX = 500.0
BALANCE = TrainingOptions(aux_loss_coef=AUX)
Worlds = Callable[[int], Ranks]
Gradients = tuple[float, float, dict[str, Tensor]]

LAYOUTS = {
    "one": (1, Layout()),
    "dp2": (2, Layout()),
    "ep2": (2, Layout(expert=2)),
    "tp2-sp": (2, Layout(tensor=2, sequence_parallel=True)),
    "tp2-ep2-sp": (2, Layout(tensor=2, expert=2, sequence_parallel=True)),
    "pp2": (2, Layout(pipeline=2)),
}


class Oracle:
    """transformers' model with foreign experts masked in every gate, and a linear head a section.

    Its tokens are of the section that `section` says."""

    def __init__(self, path: Path) -> None:
        self.model: PreTrainedModel = hf_reference.load(path)
        self.heads = {
            name: weight.requires_grad_()
            for name, weight in checks.head_weights(Qwen3VLConfig.from_hf(path)).items()
        }
        self.section = 0
        self.logits: dict[tuple[str, int], list[Tensor]] = {}
        for name, module in self.model.named_modules():
            if isinstance(module, Qwen3VLMoeTextTopKRouter):
                module.register_forward_hook(
                    lambda gate, args, out, name=name: self._mask(gate, out[0], name)
                )

    def _mask(
        self, gate: Qwen3VLMoeTextTopKRouter, logits: Tensor, name: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        own = logits[:, self.section :: 2]
        self.logits.setdefault((name, self.section), []).append(own)
        chosen, index = own.topk(gate.top_k, dim=-1)
        return logits, chosen.softmax(-1), 2 * index + self.section

    def scores(self) -> list[Tensor]:
        found = []
        for sequence in checks.mixed_batch():
            self.section = sequence.section
            head = self.heads[f"v_head.{SECTIONS[self.section]}.weight"]
            last = hf_reference.hidden(self.model, sequence)[-1]
            found.append(functional.linear(last, head).squeeze())
        return found

    def router_loss(self) -> Tensor:
        """transformers' loss of each section's tokens over the section's experts, weighted by
        tokens and averaged over layers."""
        each, top_k = DEDICATED["num_experts"] // 2, DEDICATED["num_experts_per_tok"]
        total, tokens = torch.zeros(()), 0
        for logits in map(torch.cat, self.logits.values()):
            total = total + len(logits) * load_balancing_loss_func((logits,), each, top_k)
            tokens += len(logits)
        return total / tokens

    def gradients(self, loss: Tensor) -> dict[str, Tensor]:
        named = dict(self.model.named_parameters()) | self.heads
        named.pop("lm_head.weight")
        found = torch.autograd.grad(loss, list(named.values()), retain_graph=True)
        return dict(zip(named, found, strict=True))


Wanted = tuple[Tensor, dict[float, Gradients]]


@pytest.fixture(scope="module")
def wanted(hf_models: dict[str, Path]) -> Wanted:
    """Scores, and by the router loss's weight: loss, router loss, every gradient."""
    oracle = Oracle(hf_models["dedicated"])
    scores = torch.stack(oracle.scores())
    loss, aux = scores.square().sum(), oracle.router_loss()
    gradients = {
        weight: (float(loss), float(aux), oracle.gradients(loss + weight * aux))
        for weight in (0.0, AUX)
    }
    return scores.detach(), gradients


def _compare(found: list[Gradients], wanted: Gradients) -> None:
    for loss, aux, _ in found:
        assert loss == pytest.approx(wanted[0], rel=1e-4)
        # without a weight the loss is not computed
        assert aux == 0 or aux == pytest.approx(wanted[1], rel=1e-4)
    assert set(found[0][2]) == set(wanted[2])
    wrong = {name: distance(found[0][2][name], gradient) for name, gradient in wanted[2].items()}
    assert max(wrong.values()) <= TOLERANCE, max(wrong.items(), key=lambda item: item[1])


def _judge(path: Path, layout: Layout) -> tuple[Tensor, Gradients]:
    runner = checks.make_runner(path, layout, "score")
    scores = discriminator.score(runner, checks.mixed_batch())
    return scores, checks.gradients(path, layout, "score")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scores_and_every_gradient_equal_transformers_with_masked_experts(
    ranks: Worlds, hf_models: dict[str, Path], wanted: Wanted, layout: str
) -> None:
    world, split = LAYOUTS[layout]
    results = ranks(world).run(_judge, hf_models["dedicated"], split)
    assert all(distance(scores, wanted[0]) <= TOLERANCE for scores, _ in results)
    _compare([gradients for _, gradients in results], wanted[1][0.0])


def _balance(path: Path, layout: Layout) -> Gradients:
    return checks.gradients(path, layout, "score", micro_batch_tokens=33, training=BALANCE)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_router_loss_is_that_of_each_section_over_its_own_experts(
    ranks: Worlds, hf_models: dict[str, Path], wanted: Wanted, layout: str
) -> None:
    world, split = LAYOUTS[layout]
    found = ranks(world).run(_balance, hf_models["dedicated"], split)
    _compare(found, wanted[1][AUX])
    assert found[0][1] > 0
    gates = [name for name in wanted[1][0.0][2] if name.endswith("mlp.gate.weight")]
    plain, balanced = wanted[1][0.0][2], wanted[1][AUX][2]
    assert min(distance(plain[name], balanced[name]) for name in gates) > 1e-2


def _recomputed(path: Path) -> Gradients:
    """Two micro-batches in flight: each must be recomputed with its own sections."""
    text_transformer_config = qwen3_vl.text_transformer_config

    def recomputing(*args: Any) -> TextTransformerConfig:
        config = text_transformer_config(*args)
        config.recompute_granularity, config.recompute_method = "full", "uniform"
        config.recompute_num_layers = 1
        return config

    with mock.patch.object(qwen3_vl, "text_transformer_config", recomputing):
        return checks.gradients(path, Layout(pipeline=2), "score", micro_batch_tokens=33)


def test_recomputed_activations_are_of_the_same_experts(
    ranks: Worlds, hf_models: dict[str, Path], wanted: Wanted
) -> None:
    _compare(ranks(2).run(_recomputed, hf_models["dedicated"]), wanted[1][0.0])


def _router_alone(path: Path, counts: tuple[int, int], chosen: int) -> tuple[float, float, bool]:
    """Router loss over its balanced value, and the largest gradient of a logit, with `counts`
    tokens a section of which each wants the `chosen` experts after its own number."""
    model = checks.make_runner(
        path, Layout(), "score", training=TrainingOptions(aux_loss_coef=1.0)
    ).model
    router = model.chunks[0].language_model.decoder.layers[0].mlp.router.train()
    section = torch.tensor([0] * counts[0] + [1] * counts[1])
    order = torch.cat([torch.arange(count) for count in counts])
    each, top_k = DEDICATED["num_experts"] // 2, DEDICATED["num_experts_per_tok"]
    logits = torch.zeros(len(section), each, 2)
    for k in range(top_k):
        wanted = (order % chosen + k) % each
        logits[torch.arange(len(section)), wanted] = 1.0
    logits = logits.flatten(1).unsqueeze(1).requires_grad_()
    MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1))
    mask = router_mask(torch.zeros(len(section), dtype=torch.bool), section).transpose(0, 1)
    router.eval().routing(logits, mask)
    model.set_step_loads(model.take_expert_loads())
    probs, routing_map = router.train().routing(logits, mask)
    (probs.sum() * 0.0).backward()
    loss = float(model.take_balance()[0]) / len(section)
    at_home = bool((routing_map.nonzero()[:, 1] % 2 == section.repeat_interleave(top_k)).all())
    assert logits.grad is not None
    # the gradient of T times the loss (see ModelRunner._set_router_loss_scale)
    return loss, float(logits.grad.abs().max()) / len(section), at_home


@pytest.mark.parametrize("counts", [(12, 12), (4, 20), (20, 4), (24, 0)])
def test_router_loss_is_least_when_each_section_spreads_over_its_experts(
    ranks: Worlds, hf_models: dict[str, Path], counts: tuple[int, int]
) -> None:
    path, each = hf_models["dedicated"], DEDICATED["num_experts"] // 2
    [(balanced, slope, at_home)] = ranks(1).run(_router_alone, path, counts, each)
    assert at_home
    assert balanced == pytest.approx(1.0)
    assert slope < 1e-7
    [(lopsided, slope, at_home)] = ranks(1).run(_router_alone, path, counts, 1)
    assert at_home
    assert lopsided > 1.1
    assert slope > 1e-5


def _one_sequence(path: Path, layout: Layout) -> tuple[float, float]:
    runner = checks.make_runner(path, layout, "score", training=BALANCE)
    result = runner.train_step(checks.mixed_batch()[:1], checks.final_score_loss)
    return result.sums["loss"], result.grad_norm


@pytest.mark.parametrize("kind", ["moe", "dedicated"])
def test_a_micro_batch_without_sequences_has_no_router_loss(
    ranks: Worlds, hf_models: dict[str, Path], kind: str
) -> None:
    [alone] = ranks(1).run(_one_sequence, hf_models[kind], Layout())
    for layout in (Layout(), Layout(pipeline=2, virtual_pipeline=2)):
        for found in ranks(2).run(_one_sequence, hf_models[kind], layout):
            assert found == pytest.approx(alone, rel=1e-4), layout
