"""Main weights in the place of what the model computes with, whole and the same on every rank."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn

from checkpoint_tools import megatron_directory
from model_providers import backend as backends
from model_providers import fp8_weights
from model_providers.parallel import Layout
from model_providers.weight_plan import WeightPlan, iter_hf_weights
from prism_megatron.config.schema import Optimizer
from prism_megatron.training import host_state
from prism_megatron.training.main_weights import MainWeights
from prism_megatron.training.runner import ModelRunner
from tests.dist import checks
from tests.dist.ranks import Ranks

Worlds = Callable[[int], Ranks]

LAYOUTS = {
    "dp2": ("dense", 2, Layout()),
    "tp2-sp-dp2": ("dense", 4, Layout(tensor=2, sequence_parallel=True)),
    "tp2-sp-tower": ("dense", 2, Layout(tensor=2, sequence_parallel=True, vision="replicated")),
    "cp2-pp2": ("dense", 4, Layout(context=2, pipeline=2)),
    "ep2-dp2": ("moe", 4, Layout(expert=2)),
    "tp2-ep2-sp": ("moe", 2, Layout(tensor=2, expert=2, sequence_parallel=True)),
}


def _doubled(path: Path, layout: Layout, offload: bool) -> tuple[ModelRunner, MainWeights]:
    """A BF16 model, and twice its weights in the optimizer."""
    settings = Optimizer(lr=1e-3, offload=offload)
    runner = checks.make_runner(path, layout, optimizer=settings, dtype=torch.bfloat16)
    with runner._state():
        for part in runner.optimizer.chained_optimizers:
            for shard in (s for group in part.shard_fp32_from_float16_groups for s in group):
                shard.mul_(2)
    main = runner.model.read_weight.__self__  # type: ignore[attr-defined]
    assert isinstance(main, MainWeights)
    return runner, main


def _read(path: Path, layout: Layout, offload: bool) -> tuple[list[str], list[str]]:
    runner, main = _doubled(path, layout, offload)
    source = load_file(path / "model.safetensors")
    # one receiver, so that most ranks read what nobody wants from them
    found = dict(WeightPlan(runner.model, receivers=[0], bucket_bytes=1).weights(main.whole))
    wrong = [n for n in found if not torch.equal(found[n], 2 * source[n].bfloat16())]
    # what is not rounded is the parameter itself
    plain = dict(iter_hf_weights(runner.model))
    wrong += [n for n in plain if not torch.equal(plain[n], source[n].bfloat16())]
    return wrong, sorted(found)


@pytest.mark.parametrize("offload", [False, True], ids=["", "offload"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_main_weights_are_read_whole(
    ranks: Worlds, hf_models: dict[str, Path], layout: str, offload: bool
) -> None:
    kind, world, split = LAYOUTS[layout]
    results = ranks(world).run(_read, hf_models[kind], split, offload)
    assert [wrong for wrong, _ in results] == [[]] * world
    names = sorted(load_file(hf_models[kind] / "model.safetensors"))
    assert [found for _, found in results] == [names] + [[]] * (world - 1)


def _is_matrix(value: object) -> bool:
    return isinstance(value, nn.Parameter) and value.dim() > 1


def _checkpointed(path: Path, layout: Layout, ckpt: Path) -> dict[str, Tensor]:
    runner, main = _doubled(path, layout, False)
    runner.model.read_weight = main.whole
    with mock.patch.object(megatron_directory, "is_rounded", _is_matrix):
        runner.save(ckpt, path)
    backend = backends.create("cpu")
    parallel = checks.parallel_state(layout)
    backend.seed(1, parallel)
    loaded = dict(iter_hf_weights(megatron_directory.load_model(ckpt, parallel, backend)))
    return {n: t.clone() for n, t in loaded.items()} if dist.get_rank() == 0 else {}


@pytest.mark.parametrize("layout", ["dp2", "ep2-dp2"])
def test_a_checkpoint_has_main_weights_of_what_is_rounded(
    ranks: Worlds, hf_models: dict[str, Path], tmp_path: Path, layout: str
) -> None:
    kind, world, split = LAYOUTS[layout]
    found = ranks(world).run(_checkpointed, hf_models[kind], split, tmp_path / "ckpt")[0]
    source = {
        n: t.bfloat16().float() for n, t in load_file(hf_models[kind] / "model.safetensors").items()
    }
    assert set(found) == set(source)
    doubled = {n for n in found if torch.equal(found[n], 2 * source[n])}
    assert {n for n in found if torch.equal(found[n], source[n])} == set(found) - doubled
    assert doubled == {n for n in found if found[n].dim() > 1}


def _updated(path: Path, layout: Layout, rounds: bool) -> tuple[dict[str, Tensor], list[list[int]]]:
    """Weights after two steps with the optimizer's state on the host, in pieces; rounds: as if
    matrices were in FP8. Of each call that rounds, how many weights, and how many of them here."""
    calls: list[list[int]] = []

    def together(models: Any, mains: Any, starts: Any, group: dist.ProcessGroup) -> None:
        same: list[Any] = [None] * group.size()
        dist.all_gather_object(same, [model.shape for model in models], group=group)
        assert all(shapes == same[0] for shapes in same), same
        calls.append([len(models), sum(main is not None for main in mains)])
        for model, main, start in zip(models, mains, starts, strict=True):
            assert (main is None) == (start is None)
            if main is not None:
                model.data.view(-1)[start : start + main.numel()].copy_(main)

    with (
        mock.patch.object(host_state, "PIECE", 3000),
        mock.patch.object(host_state, "is_rounded", _is_matrix if rounds else lambda model: False),
        mock.patch.object(host_state, "quantize_param_shard", together),
    ):
        settings = Optimizer(lr=1e-3, offload=True)
        runner = checks.make_runner(path, layout, optimizer=settings, dtype=torch.bfloat16)
        for _ in range(2):
            runner.train_step(checks.mixed_batch(), checks.weighted_loss(30))
    weights = {name: tensor.clone() for name, tensor in iter_hf_weights(runner.model)}
    return weights if dist.get_rank() == 0 else {}, calls


@pytest.mark.parametrize("layout", ["dp2", "ep2-dp2"])
def test_data_parallel_ranks_round_the_same_weights_together(
    ranks: Worlds, hf_models: dict[str, Path], layout: str
) -> None:
    kind, world, split = LAYOUTS[layout]
    (wanted, none), *_ = ranks(world).run(_updated, hf_models[kind], split, False)
    (found, calls), *others = ranks(world).run(_updated, hf_models[kind], split, True)
    assert none == [] and len(calls) > 20
    assert all(torch.equal(found[name], weight) for name, weight in wanted.items())
    # each weight is on one of the ranks, or in parts on both
    counts = [calls, *(rank for _, rank in others)]
    assert any(here < there for rank in counts for there, here in rank)


def test_a_plain_weight_is_assigned_and_read_as_it_is() -> None:
    parameter = nn.Parameter(torch.zeros(3, 5))
    values = torch.arange(15.0).view(3, 5)
    fp8_weights.assign(parameter, values)
    assert parameter.requires_grad and torch.equal(fp8_weights.value(parameter), values)
    assert not fp8_weights.is_rounded(parameter)
