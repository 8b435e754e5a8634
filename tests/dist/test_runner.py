"""One step of training and of inference: equal to torch on the Hugging Face model, to plain
objectives, and to one rank."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from model_providers.config import Precision, TrainingOptions
from model_providers.parallel import Layout
from model_providers.qwen3_vl import Qwen3VLModel
from model_providers.weight_plan import iter_hf_weights
from prism_megatron.config.schema import Optimizer, PolicyUpdate
from prism_megatron.objectives.losses import bradley_terry_loss, policy_loss
from prism_megatron.training import discriminator
from prism_megatron.training.policy import policy_update
from prism_megatron.training.runner import ModelRunner
from prism_megatron.types import PackedBatch, Prompt, Rollout, Sequence
from tests.dist import checks, hf_reference
from tests.dist.ranks import Ranks
from tests.tiny_models import IMAGE, TEXT, save

TP2SP = Layout(tensor=2, sequence_parallel=True)
Worlds = Callable[[int], Ranks]
Weights = dict[str, Tensor]


def _tied(path: Path, layout: Layout) -> tuple[list[float], Weights, list[Tensor]]:
    """Gradient norms of three steps, the weights, and this rank's copies of the embedding."""
    batch = checks.mixed_batch()
    tokens = float(sum(s.response_mask.sum() for s in batch))
    runner = checks.make_runner(path, layout, optimizer=Optimizer(lr=1e-2, clip_grad=0.0))
    norms = [runner.train_step(batch, checks.weighted_loss(tokens)).grad_norm for _ in range(3)]
    copies = [
        chunk.language_model.embedding.word_embeddings.weight.detach().clone()
        for chunk in runner.model.chunks
        if hasattr(chunk.language_model, "embedding")
    ]
    return norms, _weights(runner), copies


def test_both_ends_of_a_pipeline_train_one_tied_embedding(ranks: Worlds, tmp_path: Path) -> None:
    """Where data-parallel ranks share out the optimizer, and one's share ends within it."""
    with mock.patch.dict(TEXT, vocab_size=1603):
        path = save(tmp_path, "dense", tied=True)
    world = ranks(4)
    norms, weights, _ = world.run(_tied, path, Layout())[0]
    found = world.run(_tied, path, Layout(pipeline=2, first_stage_layers=3, last_stage_layers=1))
    assert found[0][0] == pytest.approx(norms, rel=1e-4)
    assert _largest_gap(found[0][1], weights) < 2e-3
    first, *others = [copy for _, _, copies in found for copy in copies]
    assert len(others) == 3 and all(torch.equal(first, other) for other in others)


def _weights(runner: ModelRunner) -> Weights:
    found = {name: tensor.clone() for name, tensor in iter_hf_weights(runner.model)}
    return found if dist.get_rank() == 0 else {}


def _largest_gap(found: Weights, wanted: Weights) -> float:
    assert set(found) == set(wanted)
    return max(float((found[name] - wanted[name]).abs().max()) for name in wanted)


def _beside_torch(path: Path, clip: float) -> tuple[list[float], list[float], float, float]:
    """Two steps here and with torch's AdamW on the Hugging Face model."""
    batch = checks.mixed_batch()
    tokens = float(sum(s.response_mask.sum() for s in batch))
    settings = Optimizer(lr=1e-2, eps=1e-3, weight_decay=0.3, betas=(0.8, 0.95), clip_grad=clip)
    runner = checks.make_runner(path, Layout(), optimizer=settings)
    before = _weights(runner)
    norms = [runner.train_step(batch, checks.weighted_loss(tokens)).grad_norm for _ in range(2)]
    reference = hf_reference.load(path)
    exempt = [p for name, p in reference.named_parameters() if p.ndim == 1]
    decayed = [p for name, p in reference.named_parameters() if p.ndim > 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.3}, {"params": exempt, "weight_decay": 0.0}],
        lr=1e-2,
        eps=1e-3,
        betas=(0.8, 0.95),
    )
    wanted_norms = []
    for _ in range(2):
        optimizer.zero_grad()
        for sequence in batch:
            logits = hf_reference.logits(reference, sequence)
            hf_reference.loss(logits, sequence, tokens).backward()
        norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), clip or float("inf"))
        wanted_norms.append(float(norm))
        optimizer.step()
    after = _weights(runner)
    gap = _largest_gap(after, {n: p.detach() for n, p in reference.named_parameters()})
    return norms, wanted_norms, gap, _largest_gap(after, before)


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_two_steps_equal_adamw_on_the_hugging_face_model(
    ranks: Worlds, hf_models: dict[str, Path], clip: float
) -> None:
    [(norms, wanted_norms, gap, moved)] = ranks(1).run(_beside_torch, hf_models["dense"], clip)
    assert norms == pytest.approx(wanted_norms, rel=1e-4)
    # the clipped case must clip
    assert min(norms) > 0.5
    assert gap < 1e-5
    assert moved > 1e-2


def _first_steps(path: Path, lacks_scales: bool) -> tuple[list[int], list[float], Weights]:
    """Forward-backward passes of the first two steps, their losses, the weights after them."""
    runner = checks.make_runner(path, Layout())
    # as for responses, which are sampled first
    runner.release()
    batch = checks.mixed_batch()
    passes = []
    with (
        mock.patch.object(type(runner.model), "lacks_gradient_scales", lambda model: lacks_scales),
        mock.patch.object(
            ModelRunner,
            "_forward_backward",
            autospec=True,
            side_effect=ModelRunner._forward_backward,
        ) as counted,
    ):
        losses = []
        for _ in range(2):
            losses.append(runner.train_step(batch, checks.weighted_loss(30)).sums["loss"])
            passes.append(counted.call_count - sum(passes))
    return passes, losses, _weights(runner)


def test_passes_that_find_scales_leave_no_gradient(
    ranks: Worlds, hf_models: dict[str, Path]
) -> None:
    [(passes, losses, weights)] = ranks(1).run(_first_steps, hf_models["dense"], True)
    [(plain, wanted, expected)] = ranks(1).run(_first_steps, hf_models["dense"], False)
    assert (passes, plain) == ([3, 1], [1, 1])
    assert losses == wanted
    assert all(torch.equal(weights[name], weight) for name, weight in expected.items())


def _two_steps(path: Path, released: bool) -> tuple[list[float], Weights, set[int]]:
    """Losses, weights, and the bytes that gradients took between the steps."""
    runner = checks.make_runner(path, Layout())
    losses, held = [], set()
    for _ in range(2):
        if released:
            runner.release()
            # twice is no more than once, and what needs no gradient works
            runner.release()
            runner.infer(checks.mixed_batch(), _every_logprob)
        for chunk in runner.ddp:
            held |= {b.grad_data.untyped_storage().nbytes() for b in chunk.buffers}
        batch = checks.mixed_batch()
        losses.append(runner.train_step(batch, checks.weighted_loss(30)).sums["loss"])
    return losses, _weights(runner), held


def test_gradients_take_no_memory_between_a_release_and_the_next_step(
    ranks: Worlds, hf_models: dict[str, Path]
) -> None:
    for found, plain in zip(
        ranks(2).run(_two_steps, hf_models["dense"], True),
        ranks(2).run(_two_steps, hf_models["dense"], False),
        strict=True,
    ):
        assert found[0] == plain[0]
        assert all(torch.equal(found[1][name], weight) for name, weight in plain[1].items())
        assert found[2] == {0} and min(plain[2]) > 0


@pytest.mark.parametrize(
    "fp8, histories, lacks",
    [
        ("delayed", [], True),
        ("delayed", [0.0, 0.0], True),
        ("delayed", [0.0, 3.0], False),
        ("tensorwise", [0.0], False),
        (None, [], False),
    ],
)
def test_delayed_scaling_lacks_scales_until_a_gradient_was_seen(
    fp8: Any, histories: list[float], lacks: bool
) -> None:
    layers = [
        SimpleNamespace(fp8_meta={"scaling_bwd": SimpleNamespace(amax_history=torch.tensor([h]))})
        for h in histories
    ]
    # as Transformer Engine has it before a forward pass, and a module that is not its own
    others = [SimpleNamespace(fp8_meta={"recipe": None}), SimpleNamespace()]
    model = SimpleNamespace(precision=Precision(fp8), modules=lambda: [*layers, *others])
    assert Qwen3VLModel.lacks_gradient_scales(cast(Any, model)) is lacks


def _tower(path: Path, layout: Layout) -> tuple[list[float], Weights, list[str]]:
    """Gradient norms of two steps, the weights after them, and names of the tower's parameters that
    are not those of the first tensor-parallel rank."""
    settings = Optimizer(lr=1e-2, eps=1e-3, weight_decay=0.3, clip_grad=0.5)
    runner = checks.make_runner(path, layout, optimizer=settings)
    norms = [
        runner.train_step(checks.mixed_batch(), checks.weighted_loss(30)).grad_norm
        for _ in range(2)
    ]
    copies = {}
    if runner.parallel.is_first_stage:
        copies = {name: p.detach() for name, p in runner.model.vision_model.named_parameters()}
    gathered: list[dict[str, Tensor]] = [{}] * layout.tensor
    dist.all_gather_object(gathered, copies, group=runner.parallel.groups.tp)
    differing = [name for name, copy in copies.items() if not torch.equal(copy, gathered[0][name])]
    return norms, _weights(runner), differing


@pytest.mark.parametrize(
    "world, layout",
    [
        (2, Layout(tensor=2, vision="replicated")),
        (2, replace(TP2SP, vision="replicated")),
        (4, replace(TP2SP, pipeline=2, vision="replicated")),
        (4, replace(TP2SP, vision="replicated")),
    ],
    ids=["tp2", "tp2-sp", "tp2-pp2-sp", "tp2-dp2-sp"],
)
def test_copies_of_a_tower_are_updated_alike_and_counted_once(
    ranks: Worlds, hf_models: dict[str, Path], world: int, layout: Layout
) -> None:
    [(wanted_norms, wanted, _)] = ranks(1).run(_tower, hf_models["dense"], Layout())
    found = ranks(world).run(_tower, hf_models["dense"], layout)
    assert min(wanted_norms) > 0.5, "clipped, so that the norm counts"
    for norms, _, differing in found:
        assert norms == pytest.approx(wanted_norms, rel=1e-4)
        assert not differing
    assert _largest_gap(found[0][1], wanted) < 1e-5


def _frozen(
    path: Path, layout: Layout, freeze: tuple[str, ...]
) -> tuple[set[str], set[str], int, int, float]:
    """Parts that moved and that stayed, values in the optimizer, values it should hold, rate."""
    runner = checks.make_runner(path, layout, freeze=freeze)
    before = {n: t.clone() for n, t in iter_hf_weights(runner.model)}
    result = runner.train_step(checks.mixed_batch(), checks.weighted_loss(30))
    after = dict(iter_hf_weights(runner.model))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    held = sum(p.numel() for group in runner.optimizer.param_groups for p in group["params"])
    trained = sum(p.numel() for p in runner.model.parameters() if p.requires_grad)
    parts = [{checks.part_of(name) for name in names} for names in (moved, set(before) - moved)]
    return parts[0], parts[1], held, trained, result.lr


@pytest.mark.parametrize("frozen", checks.FREEZES, ids="+".join)
@pytest.mark.parametrize(
    "layout",
    [TP2SP, Layout(pipeline=2, virtual_pipeline=2)],
    ids=["tp2-sp", "pp2-vpp2"],
)
def test_frozen_parts_stay_bit_equal_and_have_no_optimizer_state(
    ranks: Worlds, hf_models: dict[str, Path], layout: Layout, frozen: tuple[str, ...]
) -> None:
    """At two stages the second one has nothing to train when the decoder is frozen."""
    for moved, kept, held, trained, rate in ranks(2).run(
        _frozen, hf_models["dense"], layout, frozen
    ):
        assert kept == set(frozen)
        assert moved == set(checks.PARTS) - set(frozen)
        assert held == trained
        assert rate == pytest.approx(1e-3)


def _every_logprob(output: Tensor, batch: PackedBatch) -> list[Tensor]:
    bounds = batch.cu_seqlens[: batch.num_sequences + 1].tolist()
    return [output[a : b - 1] for a, b in pairwise(bounds)]


def _infer(path: Path, layout: Layout, micro_batch_tokens: int) -> list[Tensor]:
    runner = checks.make_runner(path, layout, micro_batch_tokens=micro_batch_tokens)
    return runner.infer(checks.mixed_batch(), _every_logprob)


@pytest.fixture(scope="module")
def logprobs(hf_models: dict[str, Path]) -> list[Tensor]:
    reference = hf_reference.load(hf_models["dense"])
    with torch.no_grad():
        return [
            hf_reference.logits(reference, s)[:-1]
            .log_softmax(-1)
            .gather(1, s.input_ids[1:, None])
            .squeeze(1)
            for s in checks.mixed_batch()
        ]


@pytest.mark.parametrize(
    "world, layout, tokens",
    [
        (1, Layout(), 4096),
        (1, Layout(), 24),
        (2, Layout(), 24),
        (2, Layout(pipeline=2), 33),
        (4, Layout(pipeline=2), 24),
        (2, Layout(pipeline=2, virtual_pipeline=2), 33),
        (4, TP2SP, 33),
        (2, Layout(context=2), 24),
        (4, Layout(context=2, tensor=2, sequence_parallel=True), 33),
        (4, Layout(context=2, pipeline=2, virtual_pipeline=2), 24),
    ],
    ids=[
        "one",
        "one-small",
        "dp2",
        "pp2",
        "pp2-dp2",
        "pp2-vpp2",
        "tp2-dp2",
        "cp2",
        "cp2-tp2",
        "cp2-pp2-vpp2",
    ],
)
def test_infer_gives_every_rank_all_results_in_order(
    ranks: Worlds,
    hf_models: dict[str, Path],
    logprobs: list[Tensor],
    world: int,
    layout: Layout,
    tokens: int,
) -> None:
    for found in ranks(world).run(_infer, hf_models["dense"], layout, tokens):
        assert len(found) == len(logprobs)
        assert all(
            torch.allclose(a, b, atol=1e-4, rtol=1e-4) for a, b in zip(found, logprobs, strict=True)
        )


def _infer_fewer_than_ranks(path: Path, layout: Layout) -> list[Tensor]:
    runner = checks.make_runner(path, layout)
    return runner.infer(checks.mixed_batch()[:1], _every_logprob)


@pytest.mark.parametrize(
    "layout", [Layout(), Layout(pipeline=2, virtual_pipeline=2)], ids=["dp2", "pp2-vpp2"]
)
def test_infer_works_with_fewer_sequences_than_ranks(
    ranks: Worlds, hf_models: dict[str, Path], logprobs: list[Tensor], layout: Layout
) -> None:
    for found in ranks(2).run(_infer_fewer_than_ranks, hf_models["dense"], layout):
        assert len(found) == 1
        assert torch.allclose(found[0], logprobs[0], atol=1e-4, rtol=1e-4)


ADAM = Optimizer(lr=1e-2, eps=1e-4)
BALANCE = TrainingOptions(aux_loss_coef=20.0)
Outcome = tuple[float, float, Weights]
"""Loss, gradient norm, weights after the step; the norm sees what Adam's scaling hides."""


def _pairs(scores: Tensor) -> Tensor:
    """Bradley-Terry over the first and the second half plus a pull towards zero."""
    teacher, student = scores.view(2, -1)
    return bradley_terry_loss(teacher, student, num_pairs=3)[0] + 0.01 * scores.square().mean()


def _two_passes(path: Path, layout: Layout, tokens: int) -> Outcome:
    runner = checks.make_runner(
        path, layout, "score", micro_batch_tokens=tokens, optimizer=ADAM, training=BALANCE
    )
    batch = checks.mixed_batch()
    scores = discriminator.score(runner, batch)
    result = discriminator.update(runner, batch, scores, runner.loads, _pairs)
    return float(_pairs(scores)), result.grad_norm, _weights(runner)


def _directly(path: Path) -> Outcome:
    """The objective inside one micro-batch that holds all sequences."""
    runner = checks.make_runner(
        path, Layout(), "score", micro_batch_tokens=4096, optimizer=ADAM, training=BALANCE
    )

    def loss(output: Tensor, batch: PackedBatch) -> tuple[Tensor, dict[str, Tensor]]:
        assert batch.num_sequences == 6
        value = _pairs(output[batch.cu_seqlens[1:7].long() - 1])
        return value, {"loss": value.detach()}

    result = runner.train_step(checks.mixed_batch(), loss)
    return result.sums["loss"], result.grad_norm, _weights(runner)


@pytest.fixture(scope="module")
def direct(ranks: Worlds, hf_models: dict[str, Path]) -> Outcome:
    [found] = ranks(1).run(_directly, hf_models["moe"])
    return found


def _same(found: Outcome, wanted: Outcome) -> None:
    assert found[0] == pytest.approx(wanted[0], rel=1e-5)
    assert found[1] == pytest.approx(wanted[1], rel=1e-4)
    assert _largest_gap(found[2], wanted[2]) < 2e-5


@pytest.mark.parametrize(
    "world, layout, tokens",
    [
        (1, Layout(), 4096),
        (1, Layout(), 24),
        (2, Layout(expert=2), 24),
        (2, Layout(), 33),
        (2, TP2SP, 40),
        (2, Layout(context=2, expert=2), 33),
        (2, Layout(pipeline=2, virtual_pipeline=2), 33),
    ],
    ids=["one-micro-batch", "many", "ep2", "dp2", "tp2-sp", "cp2-ep2", "pp2-vpp2"],
)
def test_discriminator_update_in_two_passes_is_exact(
    ranks: Worlds,
    hf_models: dict[str, Path],
    direct: Outcome,
    world: int,
    layout: Layout,
    tokens: int,
) -> None:
    found = ranks(world).run(_two_passes, hf_models["moe"], layout, tokens)[0]
    _same(found, direct)


def _samples() -> tuple[list[tuple[Prompt, Rollout]], Tensor]:
    """The mixed batch as prompts and responses, with one advantage a response."""
    samples = []
    for i, s in enumerate(checks.mixed_batch()):
        start = int(s.response_mask.nonzero()[0])
        ids = s.input_ids.tolist()
        prompt = Prompt(str(i), tuple(ids[:start]), s.images)
        response = tuple(ids[start:])
        logprobs = tuple(-0.5 - 0.1 * k for k in range(len(response)))
        samples.append((prompt, Rollout(response, logprobs, "stop", 0)))
    return samples, torch.tensor([1.5, -0.7, 0.3, -1.1, 0.9, -0.2])


def _sequences(members: slice = slice(None)) -> list[Sequence]:
    advantages = _samples()[1]
    return [
        replace(s, per_token={"advantage": advantage.expand(len(s))})
        for s, advantage in list(zip(checks.mixed_batch(), advantages, strict=True))[members]
    ]


def _policy_update(path: Path, layout: Layout, mini_batches: int) -> tuple[Outcome, Any]:
    runner = checks.make_runner(path, layout, micro_batch_tokens=33, optimizer=ADAM)
    samples, advantages = _samples()
    config = PolicyUpdate(clip_low=0.1, clip_high=0.15, mini_batches=mini_batches)
    metrics = policy_update(runner, samples, advantages, config, max_tokens=9)
    return (metrics["policy_loss"], metrics["grad_norm"], _weights(runner)), metrics


def _reinforce(path: Path) -> Outcome:
    runner = checks.make_runner(path, Layout(), micro_batch_tokens=4096, optimizer=ADAM)
    tokens = sum(int(s.response_mask.sum()) for s in _sequences())

    def loss(output: Tensor, batch: PackedBatch) -> tuple[Tensor, dict[str, Tensor]]:
        advantage = batch.per_token["advantage"] * batch.loss_mask
        # the ratio is 1, so that is the loss's value, and REINFORCE its gradient
        return -(advantage * output).sum() / tokens, {"loss": -advantage.sum() / tokens}

    result = runner.train_step(_sequences(), loss)
    return result.sums["loss"], result.grad_norm, _weights(runner)


@pytest.mark.parametrize(
    "world, layout",
    [(1, Layout()), (2, TP2SP), (2, Layout(pipeline=2)), (2, Layout(context=2))],
    ids=["one", "tp2", "pp2", "cp2"],
)
def test_one_policy_update_is_reinforce(
    ranks: Worlds, hf_models: dict[str, Path], world: int, layout: Layout
) -> None:
    [wanted] = ranks(1).run(_reinforce, hf_models["dense"])
    found, metrics = ranks(world).run(_policy_update, hf_models["dense"], layout, 1)[0]
    _same(found, wanted)
    assert metrics["clip_fraction"] == 0


def _mini_batches_by_hand(path: Path) -> tuple[list[float], Weights]:
    """Two clipped steps with old log-probabilities from before the first."""
    runner = checks.make_runner(path, Layout(), micro_batch_tokens=4096, optimizer=ADAM)
    old = runner.infer(_sequences(), _every_logprob)
    losses = []
    for part in range(2):
        members = slice(part, None, 2)
        sequences = [
            replace(s, per_token=s.per_token | {"old": torch.cat([torch.zeros(1), before])})
            for s, before in zip(_sequences(members), old[members], strict=True)
        ]
        tokens = sum(int(s.response_mask.sum()) for s in sequences)

        def loss(
            output: Tensor, batch: PackedBatch, tokens: int = tokens
        ) -> tuple[Tensor, dict[str, Tensor]]:
            values = batch.per_token
            value, _ = policy_loss(
                output,
                values["old"],
                values["advantage"],
                batch.loss_mask,
                clip_low=0.1,
                clip_high=0.15,
                denominator=tokens,
            )
            return value, {"loss": value.detach()}

        result = runner.train_step(sequences, loss)
        losses.append(result.sums["loss"])
    return losses, _weights(runner)


def test_old_log_probabilities_are_those_before_all_mini_batches(
    ranks: Worlds, hf_models: dict[str, Path]
) -> None:
    [(losses, weights)] = ranks(1).run(_mini_batches_by_hand, hf_models["dense"])
    (loss, _, found), metrics = ranks(1).run(_policy_update, hf_models["dense"], Layout(), 2)[0]
    assert loss == pytest.approx(sum(losses) / 2, rel=1e-4)
    assert _largest_gap(found, weights) < 2e-5
    # the second step does not see the policy that it updates
    assert metrics["clip_fraction"] > 0


def _mismatch(path: Path, shift: float) -> float:
    runner = checks.make_runner(path, Layout(), micro_batch_tokens=33)
    samples, advantages = _samples()
    sequences = checks.mixed_batch()
    own = runner.infer(sequences, _every_logprob)
    exact = [
        (p, replace(r, logprobs=tuple((logprobs[-len(r.ids) :] + shift).tolist())))
        for (p, r), logprobs in zip(samples, own, strict=True)
    ]
    metrics = policy_update(runner, exact, advantages, PolicyUpdate(), max_tokens=9)
    return metrics["logprob_mismatch"]


@pytest.mark.parametrize("shift", [0.0, 0.25])
def test_mismatch_is_the_distance_between_trainer_and_engine(
    ranks: Worlds, hf_models: dict[str, Path], shift: float
) -> None:
    [found] = ranks(1).run(_mismatch, hf_models["dense"], shift)
    assert found == pytest.approx(shift, abs=1e-5)


def _step_error(path: Path, sequences: list[Sequence], factor: float) -> str:
    runner = checks.make_runner(path, Layout())

    def loss(output: Tensor, batch: PackedBatch) -> tuple[Tensor, dict[str, Tensor]]:
        return output.sum() * factor, {}

    before = _weights(runner)
    try:
        runner.train_step(sequences, loss)
    except (FloatingPointError, ValueError) as error:
        assert _largest_gap(_weights(runner), before) == 0
        return f"{type(error).__name__}: {error}"
    return "taken"


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_step(
    ranks: Worlds, hf_models: dict[str, Path], factor: float
) -> None:
    [message] = ranks(1).run(_step_error, hf_models["dense"], checks.mixed_batch(), factor)
    assert message.startswith("Unsound: the loss is NaN or infinite in 2 of 2 micro-b")


def test_an_image_placeholder_in_a_response_is_refused(
    ranks: Worlds, hf_models: dict[str, Path]
) -> None:
    sequence = checks.sequence(1, 9, checks.image("wide", 4, 6))
    sequence.input_ids[-2] = IMAGE
    [message] = ranks(1).run(_step_error, hf_models["dense"], [sequence], 1.0)
    assert message.startswith("ValueError: placeholder 200 at index")


def test_a_sequence_longer_than_a_micro_batch_is_refused(
    ranks: Worlds, hf_models: dict[str, Path]
) -> None:
    sequences = [checks.sequence(1, 70)]
    [message] = ranks(1).run(_step_error, hf_models["dense"], sequences, 1.0)
    assert "sequence 0 has 71 tokens" in message
    assert "64" in message


def test_rates_follow_warm_up_and_schedule(ranks: Worlds, hf_models: dict[str, Path]) -> None:
    [rates] = ranks(1).run(_rates, hf_models["dense"])
    assert rates[:2] == pytest.approx([0.5e-2, 1e-2])
    assert all(a > b for a, b in pairwise(rates[1:]))
    assert 0 < rates[-1] < 0.1e-2


def _rates(path: Path) -> list[float]:
    settings = Optimizer(lr=1e-2, warmup_steps=2, schedule="cosine")
    runner = checks.make_runner(path, Layout(), optimizer=settings)
    loss = checks.weighted_loss(30)
    return [runner.train_step(checks.mixed_batch()[:1], loss).lr for _ in range(10)]


def _places(path: Path) -> tuple[list[str], list[str]]:
    """The model's parts as they were registered, and as the last gradient of each was there."""
    runner = checks.make_runner(path, Layout(), micro_batch_tokens=4096)
    arrived: list[str] = []
    defined: list[str] = []
    for name, parameter in runner.model.chunks[0].named_parameters():
        part = re.sub(
            r"^(vision_model|.*?embedding|.*layers\.\d+|.*norm|.*output_layer)\..*", r"\1", name
        )
        defined += [part] * (part not in defined)
        parameter.register_hook(lambda _, part=part: arrived.append(part))
    runner.forward_backward(checks.mixed_batch(), checks.weighted_loss(30))
    return defined, sorted(defined, key=lambda part: len(arrived) - arrived[::-1].index(part))


def test_gradients_come_in_the_reverse_order_of_the_parameters(
    ranks: Worlds, hf_models: dict[str, Path]
) -> None:
    """In which buckets are reduced: one that waits for a late gradient keeps all others waiting."""
    [(defined, arrived)] = ranks(1).run(_places, hf_models["dense"])
    assert len(defined) == 8 and arrived == defined[::-1]


def _update_with_idle_responses(path: Path, layout: Layout) -> tuple[Weights, Any]:
    """Every other response without advantage."""
    runner = checks.make_runner(path, layout, micro_batch_tokens=33, optimizer=ADAM)
    samples, advantages = _samples()
    advantages[::2] = 0.0
    metrics = policy_update(runner, samples, advantages, PolicyUpdate(), max_tokens=9)
    return _weights(runner), metrics


def _all_responses_run(path: Path) -> Weights:
    runner = checks.make_runner(path, Layout(), micro_batch_tokens=4096, optimizer=ADAM)
    sequences = _sequences()
    for sequence in sequences[::2]:
        sequence.per_token["advantage"] = torch.zeros(len(sequence))
    tokens = sum(int(s.response_mask.sum()) for s in sequences)

    def loss(output: Tensor, batch: PackedBatch) -> tuple[Tensor, dict[str, Tensor]]:
        value = -(batch.per_token["advantage"] * batch.loss_mask * output).sum() / tokens
        return value, {"loss": value.detach()}

    runner.train_step(sequences, loss)
    return _weights(runner)


def test_responses_without_advantage_are_not_run_and_still_count(
    ranks: Worlds, hf_models: dict[str, Path]
) -> None:
    [wanted] = ranks(1).run(_all_responses_run, hf_models["dense"])
    found, metrics = ranks(1).run(_update_with_idle_responses, hf_models["dense"], Layout())[0]
    assert _largest_gap(found, wanted) < 2e-5
    assert metrics["trained_share"] == 0.5
