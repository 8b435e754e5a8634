"""Routing replay: an update sends every token to the experts of the old log-probabilities' pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from model_providers.config import Recompute, TrainingOptions
from model_providers.parallel import Layout
from model_providers.router import SectionRouter
from model_providers.weight_plan import iter_hf_weights
from prism_megatron.config.schema import Optimizer, PolicyUpdate
from prism_megatron.training.guard import UnsoundInference
from prism_megatron.training.policy import engine_routes, policy_update, response_logprobs
from prism_megatron.types import PackedBatch, Prompt, Rollout
from tests.dist import checks
from tests.dist.ranks import Ranks
from tests.dist.test_objectives import samples

Worlds = Callable[[int], Ranks]
# large enough that the first update changes the experts of many tokens
ADAM = Optimizer(lr=2e-2, eps=1e-3)
EXPERTS = 4


def _routed_samples() -> tuple[list[tuple[Prompt, Rollout]], Tensor]:
    """The samples, with experts that no router would choose alike: 4 layers, 2 of 4 experts."""
    found, advantages = samples()
    generator = torch.Generator().manual_seed(2)
    routed = []
    for prompt, rollout in found:
        tokens = len(prompt.input_ids) + len(rollout.ids) - 1
        chosen = torch.rand(tokens, 4, EXPERTS, generator=generator).topk(2).indices
        routed.append((prompt, replace(rollout, routes=chosen.flatten(1).to(torch.uint8))))
    return routed, advantages


def _update(
    path: Path, layout: Layout, tokens: int, replay: Any, options: TrainingOptions
) -> tuple[list[Tensor], float, Any]:
    """Experts by router in each training pass of two epochs, loss, weights."""
    runner = checks.make_runner(
        path, layout, micro_batch_tokens=tokens, training=options, optimizer=ADAM
    )
    seen: list[Tensor] = []

    def record(module: Any, inputs: Any, output: Any) -> None:
        if module.training and torch.is_grad_enabled():
            seen.append(output[1].clone())

    for module in runner.model.modules():
        if isinstance(module, SectionRouter):
            module.register_forward_hook(record)
    config = PolicyUpdate(epochs=2, router_replay=replay)
    given = _routed_samples() if replay == "R3" else samples()
    metrics = policy_update(runner, *given, config, max_tokens=25)
    weights = {name: tensor.clone() for name, tensor in iter_hf_weights(runner.model)}
    return seen, metrics["policy_loss"], weights if dist.get_rank() == 0 else {}


PLAIN = TrainingOptions()


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_replay_repeats_the_experts_of_the_first_pass(
    ranks: Worlds, hf_models: dict[str, Path], recompute: Any
) -> None:
    options = TrainingOptions(recompute=Recompute(recompute))
    path, one = hf_models["moe"], (Layout(), 4096)
    [(free, _, _)] = ranks(1).run(_update, path, *one, "disabled", options)
    [(replayed, _, _)] = ranks(1).run(_update, path, *one, "R2", options)
    layers = len(free) // 2
    # recomputation runs layer by layer from the last one; both epochs do so alike
    assert any(not torch.equal(a, b) for a, b in zip(free[:layers], free[layers:], strict=True))
    for first, second, before in zip(
        replayed[:layers], replayed[layers:], free[:layers], strict=True
    ):
        assert torch.equal(first, second)
        # nothing had changed in the first epoch
        assert torch.equal(first, before)
        assert (first.sum(1) == 2).all()


def test_experts_of_the_engine_are_taken_in_every_pass(
    ranks: Worlds, hf_models: dict[str, Path]
) -> None:
    [(seen, _, _)] = ranks(1).run(_update, hf_models["moe"], Layout(), 4096, "R3", PLAIN)
    routed, advantages = _routed_samples()
    trained = [s for s, advantage in zip(routed, advantages, strict=True) if advantage]
    # all fit into one row; each sequence's last token takes the experts of the one before
    wanted = torch.cat(
        [torch.cat([r.routes, r.routes[-1:]]) for _, r in trained if r.routes is not None]
    ).view(-1, 4, 2)
    assert len(seen) == 2 * 4
    for number, taken in enumerate(seen):
        expected = torch.zeros(len(wanted), EXPERTS, dtype=torch.bool)
        expected.scatter_(1, wanted[:, number % 4].long(), True)
        # rows are planned by length
        assert sorted(map(bytes, taken[: len(wanted)].byte().numpy())) == sorted(
            map(bytes, expected.byte().numpy())
        )


CHANGES: dict[str, tuple[Callable[[Tensor], Tensor | None], str]] = {
    "none": (lambda routes: None, "the engine told none"),
    "fewer": (lambda routes: routes[1:], "the engine told those of"),
    "not recorded": (torch.zeros_like, "names an expert twice"),
}


def _told(path: Path, change: str) -> str:
    [(prompt, rollout), *_], _ = _routed_samples()
    assert rollout.routes is not None
    runner = checks.make_runner(path, Layout())
    with pytest.raises(ValueError) as error:
        engine_routes(runner, prompt, replace(rollout, routes=CHANGES[change][0](rollout.routes)))
    return str(error.value)


@pytest.mark.parametrize("change", CHANGES)
def test_experts_that_the_engine_does_not_tell_are_an_error(
    ranks: Worlds, hf_models: dict[str, Path], change: str
) -> None:
    [said] = ranks(1).run(_told, hf_models["moe"], change)
    assert CHANGES[change][1] in said


def _routes(path: Path, layout: Layout, tokens: int) -> list[Tensor]:
    runner = checks.make_runner(path, layout, micro_batch_tokens=tokens)
    return runner.infer_with_routes(checks.mixed_batch(), response_logprobs)[1]


def _recorded_after_nan(path: Path) -> Any:
    runner = checks.make_runner(path, Layout())

    def broken(output: Tensor, batch: PackedBatch) -> list[Tensor]:
        return [values / 0 for values in response_logprobs(output, batch)]

    with pytest.raises(UnsoundInference):
        runner.infer_with_routes(checks.mixed_batch(), broken)
    runner.infer(checks.mixed_batch(), response_logprobs)
    return runner._recorded


def test_a_pass_that_gives_nan_is_the_last_that_is_recorded(
    ranks: Worlds, hf_models: dict[str, Path]
) -> None:
    assert ranks(1).run(_recorded_after_nan, hf_models["moe"]) == [None]


@pytest.fixture(scope="module")
def on_one_rank(ranks: Worlds, hf_models: dict[str, Path]) -> Any:
    [routes] = ranks(1).run(_routes, hf_models["moe"], Layout(), 4096)
    updates = {
        replay: ranks(1).run(_update, hf_models["moe"], Layout(), 4096, replay, PLAIN)[0]
        for replay in ("R2", "R3")
    }
    return routes, updates


@pytest.mark.parametrize(
    "layout, tokens",
    [
        (Layout(expert=2), 33),
        (Layout(tensor=2, expert=2, sequence_parallel=True), 40),
        (Layout(context=2), 33),
        (Layout(pipeline=2, virtual_pipeline=2), 24),
    ],
    ids=["ep2", "tp2-ep2-sp", "cp2", "pp2-vpp2"],
)
def test_replay_is_that_of_one_rank(
    ranks: Worlds, hf_models: dict[str, Path], on_one_rank: Any, layout: Layout, tokens: int
) -> None:
    wanted, updates = on_one_rank
    found = ranks(2).run(_routes, hf_models["moe"], layout, tokens)
    for index, sequence in enumerate(checks.mixed_batch()):
        assert wanted[index].shape == (len(sequence), 4, 2)
        per_rank = [routes[index].sort(-1).values for routes in found]
        if layout.pipeline > 1:
            # chunks 0 and 2 are on the first stage, 1 and 3 on the second
            whole = torch.stack([per_rank[i % 2][:, i // 2] for i in range(4)], dim=1)
            assert torch.equal(whole, wanted[index].sort(-1).values)
        else:
            assert all(torch.equal(r, wanted[index].sort(-1).values) for r in per_rank)
    for replay, (_, loss, weights) in updates.items():
        _, other_loss, other_weights = ranks(2).run(
            _update, hf_models["moe"], layout, tokens, replay, PLAIN
        )[0]
        assert other_loss == pytest.approx(loss, rel=1e-3)
        assert max(float((other_weights[n] - w).abs().max()) for n, w in weights.items()) < 2e-4
