"""An update of few parameters at a time is the same update."""

from __future__ import annotations

from typing import Any

import torch

from prism_megatron.training.optimizer import in_parts, update_in_parts


class GroupAdam(torch.optim.Optimizer):
    """Adam that counts the updates of a group, as Transformer Engine's does."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, {"lr": 0.1})
        self.at_once: list[int] = []

    def step(self) -> None:  # type: ignore[override]
        self.at_once.append(sum(p.numel() for g in self.param_groups for p in g["params"]))
        for group in self.param_groups:
            if not group["params"]:
                continue
            group["step"] = group.get("step", 0) + 1
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state |= {"m": torch.zeros_like(p), "v": torch.zeros_like(p)}
                state["m"].lerp_(p.grad, 0.1)
                state["v"].lerp_(p.grad**2, 0.01)
                m, v = (state[k] / (1 - b ** group["step"]) for k, b in (("m", 0.9), ("v", 0.99)))
                p.data -= group["lr"] * m / (v.sqrt() + 1e-8)


def trained(elements: int | None) -> tuple[list[torch.Tensor], GroupAdam]:
    generator = torch.Generator().manual_seed(5)
    sizes = [[7, 3, 40, 2, 5], [11], []]
    groups = [[torch.randn(n, generator=generator) for n in group] for group in sizes]
    optimizer = GroupAdam(
        [{"params": group, "lr": 0.1 * (i + 1)} for i, group in enumerate(groups)]
    )
    if elements is not None:
        everything = [p for group in groups for p in group]
        update_in_parts(optimizer, lambda: in_parts(everything, elements))
    for _ in range(4):
        for group in groups:
            for p in group:
                p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    return [p for group in groups for p in group], optimizer


def test_parts_of_a_group_are_updated_as_the_whole() -> None:
    wanted, whole = trained(None)
    found, parts = trained(20)
    for mine, theirs in zip(found, wanted, strict=True):
        assert torch.equal(mine, theirs)
    assert [g.get("step") for g in parts.param_groups] == [4, 4, None]
    assert [len(g["params"]) for g in parts.param_groups] == [5, 1, 0]
    assert whole.at_once == 4 * [68] and parts.at_once == 4 * [10, 40, 18]
