"""The experts of a layer as one product a linear layer, against one expert after the other."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model_providers.experts import StackedExperts

HIDDEN, FEATURES, EXPERTS = 20, 12, 5


def experts() -> StackedExperts:
    config: Any = SimpleNamespace(
        hidden_size=HIDDEN,
        moe_ffn_hidden_size=FEATURES,
        params_dtype=torch.float32,
        use_cpu_initialization=True,
        expert_model_parallel_size=1,
        expert_tensor_parallel_size=1,
        tensor_model_parallel_size=1,
        bias_activation_fusion=False,
        fp8=None,
        recompute_granularity=None,
    )
    alone = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    groups: Any = SimpleNamespace(expt_tp=alone, ep=alone, expt_dp=alone)
    module = StackedExperts(EXPERTS, config, pg_collection=groups)
    torch.manual_seed(3)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    return module


def one_by_one(
    module: StackedExperts, tokens: Tensor, counts: list[int], weights: Tensor
) -> Tensor:
    found = []
    for number, (own, weight) in enumerate(
        zip(tokens.split(counts), weights.split(counts), strict=True)
    ):
        gate, up = F.linear(own, module.linear_fc1.weight[number]).chunk(2, dim=-1)
        product = F.silu(gate) * up * weight[:, None]
        found.append(F.linear(product, module.linear_fc2.weight[number]))
    return torch.cat(found)


@pytest.mark.parametrize(
    "counts", [[3, 1, 4, 2, 6], [0, 7, 0, 0, 5], [0, 0, 0, 0, 9], [8, 0, 0, 0, 0], [0] * EXPERTS]
)
def test_outputs_and_gradients_are_those_of_single_experts(counts: list[int]) -> None:
    module = experts()
    tokens = torch.randn(sum(counts), HIDDEN, requires_grad=True)
    weights = torch.rand(sum(counts), requires_grad=True)
    found, bias = module(tokens, torch.tensor(counts), weights)
    assert bias is None
    wanted = one_by_one(module, tokens, counts, weights)
    torch.testing.assert_close(found, wanted)
    slope = torch.randn_like(wanted)
    inputs = (tokens, weights, *module.parameters())
    for mine, theirs in zip(
        torch.autograd.grad(found, inputs, slope),
        torch.autograd.grad(wanted, inputs, slope),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)
