"""Entropy of the next token's distribution, with the vocabulary split over tensor-parallel ranks.

logits [T, vocab / tensor] --max, sum of exp over the ranks--> p --sum of -p log p--> H [T]
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

TOKENS_AT_ONCE = 1024
"""Rows whose probabilities are in memory at once where no gradient is wanted."""


class _Entropy(torch.autograd.Function):
    """H = -sum_j p_j log p_j; dH / dlogit_j = -p_j (log p_j + H). Ranks agree on H, and on what
    comes back for it, so backward needs none of the others."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, group: dist.ProcessGroup) -> Tensor:
        probability = _softmax(logits, group)
        entropy = -torch.special.xlogy(probability, probability).sum(-1)
        dist.all_reduce(entropy, group=group)
        ctx.save_for_backward(probability, entropy)
        ctx.dtype = logits.dtype
        return entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        probability, entropy = ctx.saved_tensors
        slope = torch.special.xlogy(probability, probability) + probability * entropy[:, None]
        return (-slope * grads[0][:, None]).to(ctx.dtype), None


def _softmax(logits: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's columns [T, vocab / tensor] of the probabilities, fp32."""
    logits = logits.float()
    largest = logits.amax(-1)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    exponentials = (logits - largest[:, None]).exp()
    total = exponentials.sum(-1)
    dist.all_reduce(total, group=group)
    return exponentials / total[:, None]


def vocab_parallel_entropy(
    logits: Tensor, group: dist.ProcessGroup, *, with_gradient: bool
) -> Tensor:
    """Entropy in nats, [T] fp32 on every rank of the tensor-parallel `group`.

    logits [T, vocab / tensor], -inf on columns that pad the vocabulary; they are left as they are.
    without gradient the rows go through in parts, so that little memory is taken.
    """
    if with_gradient:
        return _Entropy.apply(logits, group)
    with torch.no_grad():
        parts = logits.detach().split(TOKENS_AT_ONCE)
        return torch.cat([_Entropy.apply(part, group) for part in parts])
