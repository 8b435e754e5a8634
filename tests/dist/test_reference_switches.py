"""The reference's ways of scoring and updating the discriminator, by hand and in every layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model_providers.config import TrainingOptions
from model_providers.parallel import Layout
from model_providers.qwen3_vl import ScoreHead
from prism_megatron.config.schema import Optimizer
from prism_megatron.objectives.losses import bradley_terry_loss
from prism_megatron.training import discriminator
from prism_megatron.types import PackedBatch, Sequence
from tests.dist import checks
from tests.dist.ranks import Ranks

Worlds = Callable[[int], Ranks]
ADAM = Optimizer(lr=1e-2, eps=1e-3)
BF16 = TrainingOptions(score_dtype=torch.bfloat16)
SCORED = (4, 0, None, 9, 3, None)
"""Where the sequences of the mixed batch are scored; an image's token, a first one, last ones."""


def batch_of(kind: str) -> list[Sequence]:
    batch = checks.mixed_batch()
    if kind == "dropout":
        return discriminator.dropped_out(batch, 5)
    if kind == "scored":
        return [replace(s, scored=place) for s, place in zip(batch, SCORED, strict=True)]
    return batch


def _objective(scores: Tensor) -> Tensor:
    teacher, student = scores.view(2, -1)
    return bradley_terry_loss(teacher, student, num_pairs=3)[0] + 0.01 * scores.square().mean()


def _heads(model: nn.Module) -> list[ScoreHead]:
    return [module for module in model.modules() if isinstance(module, ScoreHead)]


def _update(path: Path, layout: Layout, tokens: int, kind: str) -> tuple[Tensor, float]:
    """Scores and the gradient norm of an update."""
    options = {"training": BF16} if kind == "bf16" else {}
    runner = checks.make_runner(
        path, layout, "score", micro_batch_tokens=tokens, optimizer=ADAM, **options
    )
    batch = batch_of(kind)
    scores = discriminator.score(runner, batch)
    return scores, discriminator.update(runner, batch, scores, runner.loads, _objective).grad_norm


def _by_hand(path: Path, kind: str) -> tuple[Tensor, float, Tensor, Tensor]:
    """The same in one micro-batch from what the head is given, with plain torch; then the last
    hidden states [6, h] that the head gets, and those of the model [6, h]."""
    runner = checks.make_runner(path, Layout(), "score", micro_batch_tokens=4096, optimizer=ADAM)
    [head] = _heads(runner.model)
    given: list[Tensor] = []
    head.register_forward_pre_hook(lambda module, inputs: given.append(inputs[0].detach()))
    ends: list[Tensor] = []

    def loss(output: Tensor, batch: PackedBatch) -> tuple[Tensor, dict[str, Tensor]]:
        starts, last = batch.cu_seqlens[:6].long(), batch.cu_seqlens[1:7].long() - 1
        places = [
            int(end) if place is None or kind != "scored" else int(start) + place
            for start, end, place in zip(starts, last, SCORED, strict=True)
        ]
        ends.append(torch.tensor(places))
        scores = output[places]
        value = _objective(scores)
        return value, {}

    def keep(output: Tensor, batch: PackedBatch) -> list[Tensor]:
        return [output.new_zeros(())] * batch.num_sequences

    batch = batch_of(kind)
    runner.infer(checks.mixed_batch(), keep)
    weight = head.weight.detach().clone()
    norm = runner.train_step(batch, loss).grad_norm
    plain, seen = (hidden[ends[0], 0] for hidden in given)
    return seen @ weight[0], norm, seen, plain


@pytest.fixture(scope="module")
def by_hand(ranks: Worlds, hf_models: dict[str, Path]) -> dict[str, Any]:
    kinds = ("plain", "dropout", "scored")
    return {kind: ranks(1).run(_by_hand, hf_models["moe"], kind)[0] for kind in kinds}


def test_dropout_takes_a_tenth_of_the_heads_inputs(by_hand: dict[str, Any]) -> None:
    _, _, seen, hidden = by_hand["dropout"]
    dropped = seen == 0
    torch.testing.assert_close(seen[~dropped], hidden[~dropped] / 0.9)
    # 336 draws of probability 0.1: 34 +- 5.5
    assert 17 < int(dropped.sum()) < 51
    assert len({tuple(row) for row in dropped.tolist()}) == 6
    _, _, seen, hidden = by_hand["plain"]
    assert torch.equal(seen, hidden)


@pytest.mark.parametrize("kind", ["plain", "dropout", "scored"])
@pytest.mark.parametrize(
    "world, layout, tokens",
    [
        (1, Layout(), 24),
        (2, Layout(), 33),
        (2, Layout(tensor=2, expert=2, sequence_parallel=True), 40),
        (2, Layout(context=2), 33),
        (2, Layout(pipeline=2), 33),
    ],
    ids=["small-micro-batches", "dp2", "tp2-ep2-sp", "cp2", "pp2"],
)
def test_scores_and_updates_are_those_of_one_rank(
    ranks: Worlds,
    hf_models: dict[str, Path],
    by_hand: dict[str, Any],
    kind: str,
    world: int,
    layout: Layout,
    tokens: int,
) -> None:
    wanted, norm, *_ = by_hand[kind]
    for scores, grad_norm in ranks(world).run(_update, hf_models["moe"], layout, tokens, kind):
        torch.testing.assert_close(scores, wanted, atol=2e-4, rtol=1e-4)
        assert grad_norm == pytest.approx(norm, rel=1e-3)
    if kind != "plain":
        assert float((wanted - by_hand["plain"][0]).abs().max()) > 0.1
        assert norm != pytest.approx(by_hand["plain"][1], rel=1e-2)


def test_every_update_drops_other_inputs_and_the_same_again() -> None:
    batch = checks.mixed_batch()
    seeds = [[s.dropout for s in discriminator.dropped_out(batch, k)] for k in (3, 4, 3)]
    assert seeds[0] == seeds[2]
    assert len({*seeds[0], *seeds[1]}) == 12


@pytest.mark.parametrize("layout", [Layout(), Layout(tensor=2, sequence_parallel=True)])
def test_bf16_scores_are_rounded(
    ranks: Worlds, hf_models: dict[str, Path], by_hand: dict[str, Any], layout: Layout
) -> None:
    exact, norm, *_ = by_hand["plain"]
    scores, found = ranks(layout.tensor).run(_update, hf_models["moe"], layout, 64, "bf16")[0]
    assert torch.equal(scores, scores.bfloat16().float())
    assert not torch.equal(exact, exact.bfloat16().float())
    # eight bits of the inputs, the weight and the score
    torch.testing.assert_close(scores, exact, atol=0.1, rtol=2e-2)
    assert found == pytest.approx(norm, rel=5e-2)


def test_a_bf16_head_by_hand() -> None:
    """1 + 2^-8 is rounded to 1, and a score of 3 + 2^-6 to one of multiples of 2^-6."""
    heads = {dtype: ScoreHead(3, False, dtype) for dtype in (torch.float32, torch.bfloat16)}
    hidden = torch.tensor([[[1 + 2**-8, 2.0, 2**-7]], [[1.0, 1.0, 1.0]]])
    found = []
    for head in heads.values():
        head.weight.data = torch.tensor([[1.0, 1.0, 1.5]])
        found.append(head(hidden, torch.zeros(2)).tolist())
        assert head.weight.dtype == torch.float32
    assert found == [[3 + 2**-8 + 1.5 * 2**-7, 3.5], [3 + 2**-6, 3.5]]
