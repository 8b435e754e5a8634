"""The policy in training: policy-gradient updates on sampled responses.

samples, advantages --> sequences, with the log-probabilities of the engine, of the policy
                        before the first update (and the experts that its tokens took), and of the
                        frozen reference model
epochs x mini-batches --> loss = policy + kl_coef * KL - entropy_coef * entropy --> update
"""

from __future__ import annotations

from collections.abc import Sequence as Ordered
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from prism_megatron.config.schema import PolicyUpdate
from prism_megatron.data.prompts import rollout_sequence
from prism_megatron.objectives.losses import (
    aggregation,
    importance_weights,
    kl_penalty,
    policy_loss,
    weighted_sum,
)
from prism_megatron.phases import phase
from prism_megatron.training.loop import Metrics
from prism_megatron.training.runner import ModelRunner
from prism_megatron.types import PackedBatch, Prompt, Rollout, Sequence


def policy_update(
    model: ModelRunner,
    samples: Ordered[tuple[Prompt, Rollout]],
    advantages: Tensor,
    config: PolicyUpdate,
    *,
    max_tokens: int,
    reference: ModelRunner | None = None,
) -> Metrics:
    """One optimizer step per mini-batch and epoch on all samples; advantages [n], one a response.

    max_tokens: longest response that could be sampled, for seq-mean-token-sum-norm; reference: the
    frozen start weights, for kl_coef. ValueError if there are fewer samples than mini-batches.

    With a single update the policy that is updated is the one that sampled, so the old
    log-probabilities are those of the forward pass itself and the ratio is 1. Responses without
    advantage, such as those of a prompt that every response answers, have no gradient unless KL or
    entropy count: they count in the means but are not run.

    Returns means over the updates: policy_loss (all terms), grad_norm, clip_fraction, approx_kl,
    trained_share (of responses that were run), with kl_coef kl, entropy where the model gives it,
    and of the trainer's beside the engine's probabilities: logprob_mismatch (mean distance of
    log-probabilities, which tells that weight sync and engine are right), rollout_kl,
    rollout_weight and rollout_cut (see importance_weights).
    """
    count = config.mini_batches
    if len(samples) < count:
        raise ValueError(f"mini_batches={count}, but a step has {len(samples)} responses; lower it")
    parts = [range(first, len(samples), count) for first in range(count)]
    # in the reference's mean over micro-batches a response without advantage has a part
    run_all = config.kl_coef or config.entropy_coef or config.token_mean == "reference"
    # a part without any advantage still takes its step, on a gradient of zero
    trained = [[i for i in part if run_all or advantages[i] != 0] or [part[0]] for part in parts]
    sequences = {i: _sequence(*samples[i], advantages[i]) for part in trained for i in part}
    if reference is not None:
        _add_logprobs(reference, "ref_logprobs", sequences)
    if config.router_replay == "R3":
        sequences = {
            i: replace(s, routes=engine_routes(model, *samples[i])) for i, s in sequences.items()
        }
    routes: list[Tensor] = []
    if config.updates_per_step > 1:
        routes = _add_logprobs(model, "old_logprobs", sequences, config.router_replay == "R2")
    if routes:
        sequences = {
            i: replace(sequence, routes=own)
            for (i, sequence), own in zip(sequences.items(), routes, strict=True)
        }
    updates: list[Metrics] = []
    for _ in range(config.epochs):
        for part, members in zip(parts, trained, strict=True):
            lengths = [len(samples[i][1].ids) for i in part]
            weights, denominator = aggregation(lengths, config.loss_agg_mode, max_tokens)
            for i, weight in zip(part, weights, strict=True):
                if i in sequences:
                    sequences[i].per_token["weight"] = torch.full((len(sequences[i]),), weight)
            batch = [sequences[i] for i in members]
            updates.append(_step(model, batch, config, denominator, len(part)))
    means = {name: sum(u[name] for u in updates) / len(updates) for name in updates[0]}
    return means | {"trained_share": len(sequences) / len(samples)}


def _step(
    model: ModelRunner,
    sequences: list[Sequence],
    config: PolicyUpdate,
    denominator: float,
    responses: int,
) -> Metrics:
    """One update. denominator: see aggregation; responses: how many the mini-batch has, those that
    are not run included."""

    def loss(output: Tensor, batch: PackedBatch) -> tuple[Tensor, dict[str, Tensor]]:
        logprobs, *entropy = output.unbind(-1) if output.dim() == 2 else (output,)
        mask, values = batch.loss_mask, batch.per_token
        divided_by = denominator
        if config.token_mean == "reference":
            # a micro-batch's own mean, which counts by its responses (dp_actor.py, update_policy);
            # a rank without responses has neither
            share = max(1, batch.num_sequences) / responses
            divided_by = float(mask.sum().clamp(min=1)) / share
        old = values.get("old_logprobs", logprobs.detach())
        sampled = values["rollout_logprobs"]
        correction, sums = importance_weights(
            old,
            sampled,
            mask,
            config.rollout_is,
            low=config.rollout_is_low,
            high=config.rollout_is_high,
        )
        value, clipping = policy_loss(
            logprobs,
            old,
            values["advantage"],
            mask,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            denominator=divided_by,
            dual_clip=config.dual_clip,
            loss_mode=config.loss_mode,
            weights=values["weight"] * correction,
            segments=_segments(batch) if config.loss_mode == "gspo" else None,
        )
        sums |= clipping
        sums["distance"] = weighted_sum((old - sampled).abs(), mask)
        if "ref_logprobs" in values:
            kl = kl_penalty(logprobs, values["ref_logprobs"], mask, config.kl_estimator)
            value = value + config.kl_coef * weighted_sum(kl, mask, values["weight"]) / divided_by
            sums["kl"] = kl.sum()
        if entropy:
            sums["entropy"] = weighted_sum(entropy[0], mask)
            bonus = weighted_sum(entropy[0], mask, values["weight"]) / divided_by
            value = value - config.entropy_coef * bonus if config.entropy_coef else value
        assert entropy or not config.entropy_coef, "the model was built without its entropy"
        return value, {k: v.detach() for k, v in (sums | {"policy_loss": value}).items()}

    result = model.train_step(sequences, loss)
    sums, tokens = result.sums, result.sums["tokens"]
    means = ("approx_kl", "rollout_kl", "rollout_weight", "rollout_cut", "kl", "entropy")
    return {
        "policy_loss": sums["policy_loss"],
        "grad_norm": result.grad_norm,
        "clip_fraction": (sums["clipped_high"] + sums["clipped_low"]) / tokens,
        "logprob_mismatch": sums["distance"] / tokens,
        **{name: sums[name] / tokens for name in means if name in sums},
    }


def engine_routes(model: ModelRunner, prompt: Prompt, rollout: Rollout) -> Tensor:
    """The engine's choice of experts as Sequence.routes, [L, layers, k] of this rank's layers.

    Nothing was sampled after the last token, so the engine never ran it, and nothing that is
    trained depends on it: it takes the experts of the one before. ValueError if the engine did not
    tell all.
    """
    tokens, experts = len(prompt.input_ids) + len(rollout.ids), model.model.architecture.top_k
    if rollout.routes is None or len(rollout.routes) != tokens - 1:
        told = "none" if rollout.routes is None else f"those of {len(rollout.routes)} tokens"
        raise ValueError(
            f"row {prompt.row_id}: router_replay=R3 needs the experts of {tokens - 1} tokens, the "
            f"engine told {told}"
        )
    routes = rollout.routes.view(tokens - 1, -1, experts)
    if bool((routes.sort(-1).values.diff() == 0).any()):
        raise ValueError(
            f"row {prompt.row_id}: the engine names an expert twice for one token, so that it has "
            "not recorded all of them"
        )
    return torch.cat([routes, routes[-1:]])[:, model.model.expert_layers]


def _sequence(prompt: Prompt, rollout: Rollout, advantage: Tensor) -> Sequence:
    count = len(rollout.ids)
    values = {
        "advantage": advantage.float().expand(count),
        "rollout_logprobs": torch.tensor(rollout.logprobs),
    }
    return rollout_sequence(prompt, rollout.ids, values)


@phase("log_probs")
def _add_logprobs(
    model: ModelRunner, name: str, sequences: dict[int, Sequence], with_routes: bool = False
) -> list[Tensor]:
    """Give each sequence the model's log-probabilities under that name; the experts that its tokens
    took, if asked for."""
    values, routes = list(sequences.values()), list[Tensor]()
    if with_routes:
        found, routes = model.infer_with_routes(values, response_logprobs)
    else:
        found = model.infer(values, response_logprobs)
    for sequence, logprobs in zip(values, found, strict=True):
        sequence.per_token[name] = logprobs
    return routes


def _segments(batch: PackedBatch) -> Tensor:
    """The number of each token's sequence, [T]."""
    lengths = batch.cu_seqlens.diff().long()
    return torch.repeat_interleave(lengths).to(batch.input_ids.device)


def response_logprobs(output: Tensor, batch: PackedBatch) -> list[Tensor]:
    """Log-probability of every token of each sequence, at the token; 0 on its first."""
    bounds = batch.cu_seqlens[: batch.num_sequences + 1].tolist()
    shifted = torch.cat([output.new_zeros(1), output[:-1]]).cpu()
    return [
        torch.cat([torch.zeros(1), shifted[first + 1 : last]]) for first, last in pairwise(bounds)
    ]
