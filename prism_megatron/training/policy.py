"""The policy in training: clipped policy-gradient updates on sampled responses."""

from __future__ import annotations

from collections.abc import Sequence as Ordered
from itertools import pairwise

import torch
from torch import Tensor

from prism_megatron.data.prompts import rollout_sequence
from prism_megatron.objectives.losses import policy_loss
from prism_megatron.training.loop import Metrics
from prism_megatron.training.runner import ModelRunner
from prism_megatron.types import PackedBatch, Prompt, Rollout, Sequence


def policy_update(
    model: ModelRunner,
    samples: Ordered[tuple[Prompt, Rollout]],
    advantages: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    mini_batches: int = 1,
) -> Metrics:
    """One optimizer step per mini-batch on all samples; advantages [n], one a response.

    With a single mini-batch the policy that is updated is the one that sampled, so the old
    log-probabilities are those of the forward pass itself and the ratio is 1. Responses without
    advantage, such as those of a prompt that every response answers, have no gradient: they count
    in the mean but are not run. Returns means: policy_loss, grad_norm, clip_fraction, trained_share
    (of responses that were run), and logprob_mismatch, the mean distance between the trainer's and
    the engine's log-probabilities, which tells that weight sync and engine are right.
    """
    parts = [range(first, len(samples), mini_batches) for first in range(mini_batches)]
    # a part without any advantage still takes its step, on a gradient of zero
    trained = [[i for i in part if advantages[i] != 0] or [part[0]] for part in parts]
    sequences = {i: _sequence(*samples[i], advantages[i]) for part in trained for i in part}
    if mini_batches > 1:
        old = model.infer(list(sequences.values()), response_logprobs)
        for sequence, logprobs in zip(sequences.values(), old, strict=True):
            sequence.per_token["old_logprobs"] = logprobs
    total: dict[str, float] = {}
    for part, members in zip(parts, trained, strict=True):
        tokens = sum(len(samples[i][1].ids) for i in part)
        metrics = _step(model, [sequences[i] for i in members], tokens, clip_low, clip_high)
        for name, value in metrics.items():
            total[name] = total.get(name, 0.0) + value / mini_batches
    trained_share = len(sequences) / len(samples)
    return total | {"trained_share": trained_share}


def _step(
    model: ModelRunner, sequences: list[Sequence], tokens: int, clip_low: float, clip_high: float
) -> Metrics:

    def loss(logprobs: Tensor, batch: PackedBatch) -> tuple[Tensor, dict[str, Tensor]]:
        old = batch.per_token.get("old_logprobs", logprobs.detach())
        value, sums = policy_loss(
            logprobs,
            old,
            batch.per_token["advantage"],
            batch.loss_mask,
            clip_low=clip_low,
            clip_high=clip_high,
            num_tokens=tokens,
        )
        distance = (old - batch.per_token["rollout_logprobs"]).abs() * batch.loss_mask
        return value, sums | {"policy_loss": value.detach(), "distance": distance.sum().detach()}

    result = model.train_step(sequences, loss)
    sums = result.sums
    return {
        "policy_loss": sums["policy_loss"],
        "grad_norm": result.grad_norm,
        "clip_fraction": (sums["clipped_high"] + sums["clipped_low"]) / sums["tokens"],
        "logprob_mismatch": sums["distance"] / sums["tokens"],
    }


def _sequence(prompt: Prompt, rollout: Rollout, advantage: Tensor) -> Sequence:
    count = len(rollout.ids)
    values = {
        "advantage": advantage.float().expand(count),
        "rollout_logprobs": torch.tensor(rollout.logprobs),
    }
    return rollout_sequence(prompt, rollout.ids, values)


def response_logprobs(output: Tensor, batch: PackedBatch) -> list[Tensor]:
    """Log-probability of every token of each sequence, at the token; 0 on its first."""
    bounds = batch.cu_seqlens[: batch.num_sequences + 1].tolist()
    shifted = torch.cat([output.new_zeros(1), output[:-1]]).cpu()
    return [
        torch.cat([torch.zeros(1), shifted[first + 1 : last]]) for first, last in pairwise(bounds)
    ]
