"""What the router of the experts hands to the dispatcher."""

from __future__ import annotations

from types import SimpleNamespace
from unittest import mock

import torch
from megatron.core.transformer.moe.router import TopKRouter
from torch import nn

from model_providers.router import SectionRouter


def test_the_dispatcher_may_fill_choices_up_for_fp8() -> None:
    """It writes into them, and the fused router needs its own for the backward pass."""
    kept = torch.tensor([[True, False, False], [False, True, False]])
    before = kept.clone()
    router = SectionRouter.__new__(SectionRouter)
    nn.Module.__init__(router)
    router.config = SimpleNamespace(  # type: ignore[assignment]
        expert_sections=1, moe_router_padding_for_quantization=True
    )
    with mock.patch.object(TopKRouter, "routing", lambda *arguments: (kept.float(), kept)):
        _, chosen = router.routing(torch.zeros(2, 1, 3), torch.zeros(2, 2, dtype=torch.bool))
    assert torch.equal(chosen, before)
    chosen.fill_(True)
    assert torch.equal(kept, before)
    assert torch.equal(torch.as_tensor(router.load), before.sum(0))
