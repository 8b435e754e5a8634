"""Hugging Face -> Megatron -> Hugging Face is bit-equal at every layout; what does not fit is
refused by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from model_providers import backend as backends
from model_providers import weight_plan
from model_providers.architecture import Qwen3VLConfig
from model_providers.parallel import Layout
from model_providers.qwen3_vl import Head, Qwen3VLModel
from model_providers.weight_map import all_tasks, load_hf_weights
from model_providers.weight_plan import WeightPlan, iter_hf_weights
from tests.dist import checks
from tests.dist.ranks import Ranks

Worlds = Callable[[int], Ranks]
LAYER = "model.language_model.layers.2."


def _model(path: Path, layout: Layout, head: Head = "language") -> Qwen3VLModel:
    backend = backends.create("cpu")
    parallel = checks.parallel_state(layout)
    backend.seed(3, parallel)
    return Qwen3VLModel(Qwen3VLConfig.from_hf(path), parallel, backend, head)


def _round_trip(path: Path, layout: Layout) -> list[str]:
    """Names that come back changed, twice, or not at all."""
    weights = load_file(path / "model.safetensors")
    model = _model(path, layout)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    load_hf_weights(model, weights, str(path))
    wrong, seen = [], set()
    for name, tensor in iter_hf_weights(model):
        if name in seen or not torch.equal(tensor, weights[name]):
            wrong.append(name)
        seen.add(name)
    return wrong + sorted(set(weights) ^ seen)


@pytest.mark.parametrize(
    "kind, world, layout",
    [
        ("dense", 1, Layout()),
        ("dense", 2, Layout(tensor=2)),
        ("dense", 2, Layout(pipeline=2)),
        ("dense", 4, Layout(tensor=2, pipeline=2)),
        ("dense", 4, Layout(pipeline=4)),
        ("tied", 2, Layout(tensor=2)),
        ("tied", 2, Layout(pipeline=2)),
        ("tied", 4, Layout(tensor=2, pipeline=2)),
        ("moe", 1, Layout()),
        ("moe", 2, Layout(expert=2)),
        ("moe", 2, Layout(tensor=2, expert=2, sequence_parallel=True)),
        ("moe", 4, Layout(expert=2, pipeline=2)),
        ("moe", 4, Layout(expert=4)),
        ("deep", 2, Layout(pipeline=2, virtual_pipeline=3)),
        (
            "deep",
            4,
            Layout(pipeline=4, virtual_pipeline=2, embedding_as_layer=True, loss_as_layer=True),
        ),
        ("deep", 4, Layout(tensor=2, pipeline=2, first_stage_layers=2)),
        ("deep-moe", 4, Layout(expert=2, pipeline=2, virtual_pipeline=3)),
        ("moe", 2, Layout(expert_tensor=2)),
        ("moe", 4, Layout(context=2, expert=4)),
        ("tied", 4, Layout(context=2, tensor=2, sequence_parallel=True)),
        ("dense", 4, Layout(tensor=2, pipeline=2, vision="replicated")),
        ("moe", 4, Layout(tensor=2, expert=2, expert_tensor=2, sequence_parallel=True)),
    ],
)
def test_round_trip_is_bit_equal_on_every_rank(
    ranks: Worlds, hf_models: dict[str, Path], kind: str, world: int, layout: Layout
) -> None:
    assert ranks(world).run(_round_trip, hf_models[kind], layout) == [[]] * world


def _planned(path: Path, layout: Layout, receivers: list[int], bucket_bytes: int) -> list[str]:
    """Names that a receiver gets changed, twice or not at all, and that another rank gets; a rank's
    experts travel together."""
    weights = load_file(path / "model.safetensors")
    model = _model(path, layout)
    load_hf_weights(model, weights, str(path))
    plan = WeightPlan(model, receivers=receivers, bucket_bytes=bucket_bytes)
    fused = [
        task
        for b in plan.buckets
        for task in b.tasks
        if task.hf[0].endswith("0.mlp.experts.down_proj")
    ]
    assert len(fused) == layout.expert * layout.expert_tensor * ("moe" in path.name)
    memory = plan.buffer()
    wrong, seen = [], set()
    for bucket in plan.buckets:
        out = memory if dist.get_rank() in receivers else None
        memory.fill_(255)  # every bucket has the same memory
        for name, tensor in plan.fill(bucket, out):
            if name in seen or not torch.equal(tensor, weights[name]):
                wrong.append(name)
            seen.add(name)
    for bucket in plan.buckets:
        alone = len({task.hf for task in bucket.tasks}) == 1
        assert bucket.nbytes <= bucket_bytes or alone, "larger than asked for"
    return wrong + sorted(set(weights) ^ seen if dist.get_rank() in receivers else seen)


@pytest.mark.parametrize(
    "kind, world, layout, receivers, bucket_bytes",
    [
        ("dense", 2, Layout(tensor=2), [1], 2**14),
        ("dense", 4, Layout(tensor=2, pipeline=2), [0], 1),
        ("dense", 2, Layout(tensor=2, vision="replicated"), [0, 1], 2**14),
        ("tied", 4, Layout(tensor=2, sequence_parallel=True), [0, 1, 3], 2**16),
        ("deep", 4, Layout(pipeline=4, first_stage_layers=3), [3], 2**15),
        ("deep-moe", 4, Layout(expert=2, pipeline=2, virtual_pipeline=3), [0, 2], 2**16),
        ("moe", 4, Layout(tensor=2, expert=2, expert_tensor=2, sequence_parallel=True), [2], 2**30),
        ("moe", 2, Layout(expert=2), [0, 1], 1),
    ],
)
def test_receivers_alone_get_the_weights_bucket_by_bucket(
    ranks: Worlds,
    hf_models: dict[str, Path],
    kind: str,
    world: int,
    layout: Layout,
    receivers: list[int],
    bucket_bytes: int,
) -> None:
    found = ranks(world).run(_planned, hf_models[kind], layout, receivers, bucket_bytes)
    assert found == [[]] * world


def _cut(path: Path, layout: Layout, receivers: list[int], experts: int) -> list[Any]:
    """Names that come wrong, twice or not at all if buckets hold no more than that many experts,
    and how many experts come together."""
    weights = load_file(path / "model.safetensors")
    model = _model(path, layout)
    load_hf_weights(model, weights, str(path))
    most = experts * max(t[0].nbytes for n, t in weights.items() if n.endswith("gate_up_proj"))
    plan = WeightPlan(model, receivers=receivers, bucket_bytes=most, cut_experts=True)
    memory = plan.buffer()
    receives = dist.get_rank() in receivers
    parts: dict[str, list[Tensor]] = {}
    wrong, together = [], set()
    for bucket in plan.buckets:
        fused = any(".experts." in task.hf[0] for task in bucket.tasks)
        if fused and bucket.nbytes + bucket.scratch > most:
            wrong.append(f"{bucket.nbytes} bytes of {bucket.tasks[0].hf}, more than {most}")
        memory.fill_(255)  # every bucket has the same memory
        for name, tensor in plan.fill(bucket, memory if receives else None):
            whole, cut, part = name.partition("[")
            before = parts.setdefault(whole, [])
            first = sum(map(len, before))
            if cut and part != f"{first}:{first + len(tensor)}]":
                wrong.append(name)
            if ".experts." in name:
                together.add(len(tensor))
            before.append(tensor.clone())
    found = {name: torch.cat(tensors) for name, tensors in parts.items()}
    missing = set(weights) ^ set(found) if receives else set(found)
    wrong += [n for n in found if n in weights and not torch.equal(found[n], weights[n])]
    return [sorted(missing) + wrong, sorted(together)]


@pytest.mark.parametrize(
    "kind, world, layout, receivers, experts, together",
    [
        ("moe", 1, Layout(), [0], 3, 2),
        ("moe", 2, Layout(expert=2), [0, 1], 1, 1),
        # of several ranks
        ("moe", 4, Layout(expert=4), [1, 2], 3, 2),
        ("moe", 4, Layout(expert=4), [0], 4, 4),
        ("moe", 4, Layout(expert=2, expert_tensor=2, tensor=2), [3], 2, 2),
        ("deep-moe", 4, Layout(expert=2, pipeline=2, virtual_pipeline=3), [0, 2], 1, 1),
    ],
)
def test_experts_that_do_not_fit_a_bucket_come_in_parts(
    ranks: Worlds,
    hf_models: dict[str, Path],
    kind: str,
    world: int,
    layout: Layout,
    receivers: list[int],
    experts: int,
    together: int,
) -> None:
    layout = replace(layout, sequence_parallel=layout.tensor > 1)
    found = ranks(world).run(_cut, hf_models[kind], layout, receivers, experts)
    expected = [[[], [together] if rank in receivers else []] for rank in range(world)]
    assert found == expected


def _traffic(path: Path, layout: Layout, receivers: list[int], hosts: str) -> list[str]:
    """As _planned, on hosts by letter, and what takes another way than it should: between hosts
    more than once to each, or to one that has it."""
    name = hosts[dist.get_rank()]
    with mock.patch.object(weight_plan.socket, "gethostname", lambda: name):
        wrong = _planned(path, layout, receivers, 2**16)
        plan = WeightPlan(_model(path, layout), receivers=receivers, bucket_bytes=2**16)
    mine = [[each.sent for each in bucket.rounds] for bucket in plan.buckets]
    everybody: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, mine)
    holders = all_tasks(plan.model, list(plan.local.values()))
    for number, bucket in enumerate(plan.buckets):
        have = {task: {hosts[rank] for rank in holders[task]} for task in bucket.tasks}
        for turn in range(2):
            new = [
                (task, hosts[sender], hosts[receiver])
                for sender, sent in enumerate(rounds[number][turn] for rounds in everybody)
                for receiver, tasks in enumerate(sent)
                for task in tasks
            ]
            for task, start, end in new:
                right = (start != end and end not in have[task]) if turn == 0 else start == end
                wrong += [] if right else [f"{task.hf} from {start} to {end} in round {turn}"]
                have[task].add(end)
    return wrong


@pytest.mark.parametrize(
    "kind, layout, receivers, hosts",
    [
        ("deep-moe", Layout(expert=2, pipeline=2, virtual_pipeline=3), [0, 1, 2, 3], "aabb"),
        ("deep", Layout(pipeline=4, first_stage_layers=3), [0, 1, 2, 3], "aabb"),
        ("moe", Layout(expert=2), [0, 1, 2, 3], "abab"),
        ("dense", Layout(tensor=2, pipeline=2), [0, 2, 3], "abbb"),
        ("dense", Layout(tensor=2), [1, 2], "aaab"),
    ],
)
def test_a_shard_goes_to_a_host_once(
    ranks: Worlds,
    hf_models: dict[str, Path],
    kind: str,
    layout: Layout,
    receivers: list[int],
    hosts: str,
) -> None:
    assert ranks(4).run(_traffic, hf_models[kind], layout, receivers, hosts) == [[]] * 4


def _refusal(path: Path, head: Head, change: Callable[[dict[str, Tensor]], None]) -> str:
    """The error, and proof that it came before anything was written."""
    weights = load_file(path / "model.safetensors")
    change(weights)
    model = _model(path, Layout(), head)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    try:
        load_hf_weights(model, weights, str(path))
    except ValueError as error:
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, before[name]) or before[name].isnan().any(), name
        return str(error)
    return "accepted"


def _drop_gate(weights: dict[str, Tensor]) -> None:
    del weights[LAYER + "mlp.gate_proj.weight"]


def _add_bias(weights: dict[str, Tensor]) -> None:
    weights[LAYER + "self_attn.q_proj.bias"] = torch.zeros(96)


def _widen_down(weights: dict[str, Tensor]) -> None:
    weights[LAYER + "mlp.down_proj.weight"] = torch.zeros(56, 114)


def _shorten_key(weights: dict[str, Tensor]) -> None:
    weights[LAYER + "self_attn.k_proj.weight"] = torch.zeros(31, 56)


def _cut_vocabulary(weights: dict[str, Tensor]) -> None:
    weights["lm_head.weight"] = weights["lm_head.weight"][:202]


@pytest.mark.parametrize(
    "change, words",
    [
        (_drop_gate, ["1 missing", LAYER + "mlp.gate_proj.weight"]),
        (_add_bias, ["1 surplus", LAYER + "self_attn.q_proj.bias"]),
        (_widen_down, [LAYER + "mlp.down_proj.weight", "(56, 114)", "(56, 112)"]),
        (_shorten_key, [LAYER + "self_attn.k_proj.weight", "(31, 56)"]),
        (_cut_vocabulary, ["lm_head.weight", "(202, 56)", "(203, 56)"]),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(
    ranks: Worlds,
    hf_models: dict[str, Path],
    change: Callable[[dict[str, Tensor]], None],
    words: list[str],
) -> None:
    [message] = ranks(1).run(_refusal, hf_models["dense"], "language", change)
    assert all(word in message for word in words), message


def _unchanged(weights: dict[str, Tensor]) -> None: ...


def test_a_language_model_has_no_value_head_to_score_with(
    ranks: Worlds, hf_models: dict[str, Path]
) -> None:
    [message] = ranks(1).run(_refusal, hf_models["moe"], "score", _unchanged)
    assert "1 missing (v_head.1.weight)" in message
    # the language head that a discriminator carries along is no surplus
    assert "surplus" not in message
