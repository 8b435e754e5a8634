"""Every loss of policy and discriminator is one rank's in any layout and any micro-batches."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from model_providers.config import TrainingOptions
from model_providers.entropy import TOKENS_AT_ONCE, vocab_parallel_entropy
from model_providers.parallel import Layout
from model_providers.router import SectionRouter
from model_providers.weight_plan import iter_hf_weights
from prism_megatron.config.schema import Optimizer, PolicyUpdate
from prism_megatron.data.packing import plan_micro_batches
from prism_megatron.training import discriminator
from prism_megatron.training.policy import policy_update
from prism_megatron.types import Prompt, Rollout
from tests.dist import checks, hf_reference
from tests.dist.ranks import Ranks

Worlds = Callable[[int], Ranks]
TP2SP = Layout(tensor=2, sequence_parallel=True)
# so small a rate that the updates before do not tell on the next one's numbers
ADAM = Optimizer(lr=1e-3, eps=1e-3)

UPDATES = {
    "dual-clip-tis": PolicyUpdate(
        clip_low=0.05, clip_high=0.1, dual_clip=1.2, mini_batches=2, rollout_is="tis"
    ),
    "gspo": PolicyUpdate(
        loss_mode="gspo",
        loss_agg_mode="seq-mean-token-mean",
        clip_low=0.01,
        clip_high=0.02,
        mini_batches=2,
    ),
    "cispo-icepop": PolicyUpdate(loss_mode="cispo", clip_low=1.0, epochs=2, rollout_is="icepop"),
    "dr-grpo-kl": PolicyUpdate(loss_agg_mode="seq-mean-token-sum-norm", kl_coef=0.5),
    "sum-k2-mis": PolicyUpdate(
        loss_agg_mode="seq-mean-token-sum", kl_coef=0.3, kl_estimator="k2", rollout_is="mis"
    ),
    "entropy": PolicyUpdate(entropy_coef=0.2),
}
COMPARED = ("policy_loss", "grad_norm", "entropy", "kl", "rollout_kl", "rollout_cut", "approx_kl")


def samples() -> tuple[list[tuple[Prompt, Rollout]], Tensor]:
    """The mixed batch as prompts and responses; the second has no advantage."""
    found = []
    for i, s in enumerate(checks.mixed_batch()):
        start = int(s.response_mask.nonzero()[0])
        ids = s.input_ids.tolist()
        logprobs = tuple(-4.0 - 0.5 * k for k in range(len(ids) - start))
        rollout = Rollout(tuple(ids[start:]), logprobs, "stop", 0)
        found.append((Prompt(str(i), tuple(ids[:start]), s.images), rollout))
    return found, torch.tensor([1.5, 0.0, 0.3, -1.1, 0.9, -0.2])


def _updates(path: Path, layout: Layout, tokens: int) -> tuple[list[dict[str, float]], Any]:
    """Metrics of all UPDATES after each other, and the weights after them."""
    options = TrainingOptions(entropy="loss")
    runner = checks.make_runner(
        path, layout, micro_batch_tokens=tokens, training=options, optimizer=ADAM
    )
    frozen = checks.make_runner(path, layout, micro_batch_tokens=tokens)
    batch, advantages = samples()
    found = [
        policy_update(
            runner,
            batch,
            advantages,
            config,
            max_tokens=25,
            reference=frozen if config.kl_coef else None,
        )
        for config in UPDATES.values()
    ]
    weights = {name: tensor.clone() for name, tensor in iter_hf_weights(runner.model)}
    return found, weights if dist.get_rank() == 0 else {}


@pytest.fixture(scope="module")
def on_one_rank(ranks: Worlds, hf_models: dict[str, Path]) -> Any:
    [found] = ranks(1).run(_updates, hf_models["dense"], Layout(), 4096)
    return found


@pytest.mark.parametrize(
    "world, layout, tokens",
    [
        (1, Layout(), 24),
        (2, Layout(), 33),
        (2, TP2SP, 40),
        (2, Layout(context=2), 33),
        (2, Layout(pipeline=2, virtual_pipeline=2), 24),
    ],
    ids=["small-micro-batches", "dp2", "tp2-sp", "cp2", "pp2-vpp2"],
)
def test_every_policy_loss_is_that_of_one_rank(
    ranks: Worlds,
    hf_models: dict[str, Path],
    on_one_rank: Any,
    world: int,
    layout: Layout,
    tokens: int,
) -> None:
    metrics, weights = ranks(world).run(_updates, hf_models["dense"], layout, tokens)[0]
    wanted, wanted_weights = on_one_rank
    for name, found, expected in zip(UPDATES, metrics, wanted, strict=True):
        assert found.keys() == expected.keys()
        for metric in COMPARED:
            if metric in expected:
                close = pytest.approx(expected[metric], rel=2e-3, abs=2e-5)
                assert found[metric] == close, f"{name}: {metric}"
    gaps = [float((weights[n] - w).abs().max()) for n, w in wanted_weights.items()]
    assert max(gaps) < 1e-4


def test_what_the_updates_report(on_one_rank: Any) -> None:
    found = dict(zip(UPDATES, on_one_rank[0], strict=True))
    # only where KL or entropy count is a response without advantage run
    assert {name: m["trained_share"] for name, m in found.items() if m["trained_share"] == 1} == {
        "dr-grpo-kl": 1, "sum-k2-mis": 1, "entropy": 1,
    }  # fmt: skip
    assert {name for name, m in found.items() if "kl" in m} == {"dr-grpo-kl", "sum-k2-mis"}
    assert all(m["kl"] > 0 for m in found.values() if "kl" in m)
    cut = {name for name, m in found.items() if m["rollout_cut"] > 0}
    assert cut == {"dual-clip-tis", "cispo-icepop", "sum-k2-mis"}
    assert found["gspo"]["clip_fraction"] > 0 and found["dual-clip-tis"]["clip_fraction"] > 0
    assert all(m["entropy"] > 1 for m in found.values())


def _one_update(path: Path, config: PolicyUpdate) -> dict[str, float]:
    options = TrainingOptions(entropy="loss")
    runner = checks.make_runner(path, Layout(), micro_batch_tokens=33, training=options)
    return policy_update(runner, *samples(), config, max_tokens=25)


def _by_torch(path: Path, entropy_coef: float) -> tuple[float, float, float]:
    """Loss, entropy and gradient norm of REINFORCE with an entropy bonus."""
    model = hf_reference.load(path)
    batch, advantages = checks.mixed_batch(), samples()[1]
    tokens = sum(int(s.response_mask.sum()) for s in batch)
    loss, entropies = torch.zeros(()), torch.zeros(())
    for sequence, advantage in zip(batch, advantages, strict=True):
        logprobs = hf_reference.logits(model, sequence)[:-1].log_softmax(-1)
        chosen = logprobs.gather(1, sequence.input_ids[1:, None])[:, 0]
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        mask = sequence.response_mask[1:]
        loss = loss - (advantage * chosen)[mask].sum() / tokens
        entropies = entropies + entropy[mask].sum() / tokens
    (loss - entropy_coef * entropies).backward()
    squares = [p.grad.square().sum() for p in model.parameters() if p.grad is not None]
    return float(entropies), float(torch.stack(squares).sum().sqrt()), float(loss)


def test_entropy_and_its_gradient_are_those_of_torch(
    ranks: Worlds, hf_models: dict[str, Path]
) -> None:
    config = PolicyUpdate(entropy_coef=0.7)
    [metrics] = ranks(1).run(_one_update, hf_models["dense"], config)
    entropy, wanted, _ = _by_torch(hf_models["dense"], 0.7)
    assert metrics["entropy"] == pytest.approx(entropy, rel=1e-4)
    assert metrics["grad_norm"] == pytest.approx(wanted, rel=1e-4)
    assert wanted != pytest.approx(_by_torch(hf_models["dense"], 0.0)[1], rel=1e-2)


def _entropy(vocab: int) -> tuple[Tensor, Tensor, Tensor, bool]:
    """Entropy and its gradient of logits that the ranks share; the last two columns are padding."""
    world, rank = dist.get_world_size(), dist.get_rank()
    whole = 3 * torch.randn(TOKENS_AT_ONCE + 5, vocab, generator=torch.Generator().manual_seed(1))
    whole[:, -2:] = -torch.inf
    part = whole.chunk(world, dim=1)[rank].clone().requires_grad_()
    found = vocab_parallel_entropy(part, dist.group.WORLD, with_gradient=True)
    (found * torch.linspace(-1, 2, len(found))).sum().backward()
    plain = vocab_parallel_entropy(part, dist.group.WORLD, with_gradient=False)
    assert part.grad is not None
    gradients = [torch.zeros_like(part) for _ in range(world)]
    dist.all_gather(gradients, part.grad)
    return found.detach(), torch.cat(gradients, 1), plain, plain.requires_grad


@pytest.mark.parametrize("world", [1, 2])
def test_entropy_over_a_split_vocabulary(ranks: Worlds, world: int) -> None:
    whole = 3 * torch.randn(TOKENS_AT_ONCE + 5, 8, generator=torch.Generator().manual_seed(1))
    leaf = whole[:, :-2].clone().requires_grad_()
    wanted = torch.distributions.Categorical(logits=leaf).entropy()
    (wanted * torch.linspace(-1, 2, len(wanted))).sum().backward()
    assert leaf.grad is not None
    for found, gradient, plain, has_graph in ranks(world).run(_entropy, 8):
        torch.testing.assert_close(found, wanted.detach())
        torch.testing.assert_close(gradient[:, :-2], leaf.grad, atol=1e-5, rtol=1e-4)
        assert gradient[:, -2:].abs().max() == 0
        torch.testing.assert_close(plain, found)
        assert not has_graph


def _micro_batch_means(path: Path, layout: Layout, tokens: int) -> tuple[float, float]:
    """Loss and gradient norm of an update with the reference's token mean."""
    runner = checks.make_runner(path, layout, micro_batch_tokens=tokens, optimizer=ADAM)
    config = PolicyUpdate(token_mean="reference")
    metrics = policy_update(runner, *samples(), config, max_tokens=25)
    return metrics["policy_loss"], metrics["grad_norm"]


def test_reference_token_mean_weighs_a_micro_batch_by_its_responses(
    ranks: Worlds, hf_models: dict[str, Path]
) -> None:
    """On-policy the loss is minus the advantages' mean: over all tokens in one micro-batch, over
    responses where each has a micro-batch of its own."""
    batch, advantages = samples()
    lengths = torch.tensor([float(len(rollout.ids)) for _, rollout in batch])
    whole = -float((advantages * lengths).sum() / lengths.sum())
    [one] = ranks(1).run(_micro_batch_means, hf_models["dense"], Layout(), 4096)
    assert one[0] == pytest.approx(whole, rel=1e-4)
    longest = max(len(s) for s in checks.mixed_batch())
    [alone] = ranks(1).run(_micro_batch_means, hf_models["dense"], Layout(), longest)
    assert alone[0] != pytest.approx(whole, rel=1e-2)
    assert alone[0] == pytest.approx(_means_of(longest), rel=1e-4)
    # fewer responses than rows
    spread = ranks(2).run(_micro_batch_means, hf_models["dense"], Layout(), longest)[0]
    assert math.isfinite(spread[0]) and spread[1] > 0


def _means_of(tokens: int) -> float:
    """The same from the plan of the micro-batches."""
    batch, advantages = samples()
    sizes = [len(s) for s in checks.mixed_batch()]
    [plan] = plan_micro_batches(sizes, dp_size=1, max_tokens=tokens)
    total = 0.0
    for members in plan:
        lengths = torch.tensor([float(len(batch[i][1].ids)) for i in members])
        mean = (advantages[members] * lengths).sum() / lengths.sum()
        total -= float(mean) * len(members) / len(batch)
    return total


def _penalty(path: Path, layout: Layout, tokens: int) -> tuple[Tensor, Tensor, float, float, float]:
    """Scores without and with noise, gradient norm of the penalty, load entropy, also by hand."""
    runner = checks.make_runner(path, layout, "score", micro_batch_tokens=tokens, optimizer=ADAM)
    plain = checks.mixed_batch()
    noisy = discriminator.noisy(plain, 0.3, step=5)
    scores = discriminator.score(runner, [*plain, *noisy])
    seen: list[Tensor] = []

    def count(module: Any, inputs: Any, output: Any) -> None:
        seen.append(output[1].sum(0))

    hooks = [
        m.register_forward_hook(count) for m in runner.model.modules()
        if isinstance(m, SectionRouter)
    ]  # fmt: skip
    result = discriminator.update(
        runner,
        [*plain, *noisy],
        scores,
        runner.loads,
        lambda s: (s[:6] - s[6:]).square().mean(),
    )
    for hook in hooks:
        hook.remove()
    by_hand = 0.0
    if dist.get_world_size() == 1:
        loads = torch.stack(seen).view(-1, len(hooks), seen[0].numel()).sum(0).float()
        shares = loads / loads.sum(-1, keepdim=True)
        by_hand = float(-(shares * shares.log()).nansum(-1).mean() / math.log(shares.shape[1]))
    return scores[:6], scores[6:], result.grad_norm, result.sums["load_entropy"], by_hand


@pytest.fixture(scope="module")
def penalty(ranks: Worlds, hf_models: dict[str, Path]) -> Any:
    [found] = ranks(1).run(_penalty, hf_models["moe"], Layout(), 4096)
    return found


def test_noise_moves_scores_and_load_entropy_is_counted_over_the_step(penalty: Any) -> None:
    plain, noisy, norm, entropy, by_hand = penalty
    assert ((plain - noisy).abs() > 1e-3).all()
    assert norm > 0
    assert 0 < entropy < 1
    assert entropy == pytest.approx(by_hand, rel=1e-5)


@pytest.mark.parametrize(
    "world, layout, tokens",
    [
        (1, Layout(), 24),
        (2, Layout(expert=2), 33),
        (2, Layout(tensor=2, expert=2, sequence_parallel=True), 40),
        (2, Layout(context=2), 33),
        (2, Layout(pipeline=2), 33),
    ],
    ids=["small-micro-batches", "ep2", "tp2-ep2-sp", "cp2", "pp2"],
)
def test_gradient_penalty_and_expert_load_are_those_of_one_rank(
    ranks: Worlds,
    hf_models: dict[str, Path],
    penalty: Any,
    world: int,
    layout: Layout,
    tokens: int,
) -> None:
    plain, noisy, norm, entropy, _ = ranks(world).run(_penalty, hf_models["moe"], layout, tokens)[0]
    torch.testing.assert_close(plain, penalty[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(noisy, penalty[1], atol=1e-4, rtol=1e-4)
    assert norm == pytest.approx(penalty[2], rel=1e-3)
    assert entropy == pytest.approx(penalty[3], rel=1e-4)
