"""Fused experts reach each rank of an engine as the engine's own loader would have put them there,
without being turned, and by that loader where the rank holds them otherwise."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable
from itertools import chain
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor, nn

from prism_megatron.rollout import fused_experts

EXPERTS, FFN, HIDDEN = 6, 20, 40  # 2 * FFN is HIDDEN: the shape doesn't tell how gate_up lies
LAYER = "model.language_model.layers.1.mlp.experts."


def _sent() -> dict[str, Tensor]:
    return {
        LAYER + "w13_weight": torch.randn(EXPERTS, 2 * FFN, HIDDEN),
        LAYER + "w2_weight": torch.randn(EXPERTS, HIDDEN, FFN),
    }


def _empty(tensor: int, expert: int) -> dict[str, Tensor]:
    own, ffn = EXPERTS // expert, FFN // tensor
    shapes = {"w13_weight": (own, 2 * ffn, HIDDEN), "w2_weight": (own, HIDDEN, ffn)}
    return {LAYER + name: torch.full(shape, torch.nan) for name, shape in shapes.items()}


def _one_by_one(
    parameters: dict[str, Tensor], weights: Iterable[tuple[str, Tensor]], tp_rank: int, ep_rank: int
) -> None:
    """As SGLang's load_fused_expert_weights and FusedMoE.weight_loader do."""
    for name, stored in weights:
        turned = stored.transpose(-1, -2)
        if name.endswith("gate_up_proj"):
            target = parameters[LAYER + "w13_weight"]
            ffn = target.shape[1] // 2
            shards = [(target[:, :ffn], turned.chunk(2, 1)[0], 0)]
            shards += [(target[:, ffn:], turned.chunk(2, 1)[1], 0)]
        else:
            target = parameters[LAYER + "w2_weight"]
            ffn = target.shape[2]
            shards = [(target, turned, 1)]
        for to, source, dim in shards:
            for expert in range(EXPERTS):
                own = expert - ep_rank * len(target)
                if 0 <= own < len(target):
                    to[own].copy_(source[expert].narrow(dim, tp_rank * ffn, ffn))


@pytest.mark.parametrize("tensor", [1, 2, 4])
@pytest.mark.parametrize("expert", [1, 2, 3])
def test_a_share_is_what_a_loader_of_experts_one_by_one_copies(tensor: int, expert: int) -> None:
    sent = _sent()
    for tp_rank in range(tensor):
        for ep_rank in range(expert):
            found, wanted = _empty(tensor, expert), _empty(tensor, expert)
            _one_by_one(wanted, _stored(sent), tp_rank, ep_rank)
            for name, whole in sent.items():
                ep, tp = (ep_rank, expert), (tp_rank, tensor)
                assert fused_experts.load_share(found[name], name, whole, ep, tp)
                assert torch.equal(found[name], wanted[name])
                for size in (1, 2, 3):
                    found[name].fill_(torch.nan)
                    for part, some in _parts(name, whole, size):
                        assert fused_experts.load_share(found[name], part, some, ep, tp)
                    assert torch.equal(found[name], wanted[name])


def test_parts_are_stored_one_by_one_as_checkpoints_have_them() -> None:
    sent = _sent()
    whole = dict(_stored(sent))
    parts = dict(_stored(dict(p for item in sent.items() for p in _parts(*item, size=4))))
    assert len(parts) == 3 * EXPERTS
    for expert in range(EXPERTS):
        gate, up = whole[LAYER + "gate_up_proj"][expert].T.chunk(2)
        down = whole[LAYER + "down_proj"][expert].T
        for name, wanted in (("gate", gate), ("up", up), ("down", down)):
            assert torch.equal(parts[f"{LAYER}{expert}.{name}_proj.weight"], wanted)


def _stored(sent: dict[str, Tensor]) -> Iterable[tuple[str, Tensor]]:
    return chain.from_iterable(fused_experts.as_stored(*item) for item in sent.items())


def _parts(name: str, whole: Tensor, size: int) -> list[tuple[str, Tensor]]:
    starts = range(0, EXPERTS, size)
    return [
        (f"{name}[{first}:{first + len(some)}]", some)
        for first, some in zip(starts, whole.split(size), strict=True)
    ]


def test_a_parameter_of_another_shape_gets_nothing() -> None:
    sent, empty = _sent(), _empty(tensor=1, expert=1)
    for name, parameter in empty.items():
        for other in (parameter[:, :, :-2], parameter[:, :-2], parameter[:-1]):
            assert not fused_experts.load_share(other, name, sent[name], (0, 1), (0, 1))
        assert not fused_experts.load_share(parameter, name, sent[name], (0, 1), (0, 2))
        assert not fused_experts.load_share(parameter, name, sent[name], (0, 2), (0, 1))
        for part in ("[0:5]", "[4:7]", "[1:7]"):
            other = sent[name][: 3 if part == "[4:7]" else 6]
            assert not fused_experts.load_share(parameter, name + part, other, (0, 1), (0, 1))
        assert parameter.isnan().all()


def test_names_lead_there_and_back_and_others_stay() -> None:
    for name in (LAYER + "gate_up_proj", LAYER + "down_proj"):
        sent = fused_experts.sent_name(name)
        assert sent != name and fused_experts.hf_name(sent) == name
        part = fused_experts.sent_name(name + "[2:4]")
        assert part == sent + "[2:4]" and fused_experts.hf_name(part) == name
    # a dense layer's, and an expert's own
    for name in ("model.layers.1.mlp.down_proj.weight", LAYER + "3.down_proj.weight"):
        assert fused_experts.sent_name(name) == fused_experts.hf_name(name) == name
        tensor = torch.zeros(2, 3)
        assert list(fused_experts.as_stored(name, tensor)) == [(name, tensor)]


class _Own(nn.Module):
    """In the place of an engine's own model: what its load_weights was given."""

    def __init__(self, experts: Any) -> None:
        super().__init__()
        self.config = SimpleNamespace(encoder_only=False)
        layers = [None, SimpleNamespace(mlp=SimpleNamespace(experts=experts))]
        self.model = SimpleNamespace(start_layer=1, end_layer=2, layers=layers)
        self.given: list[list[tuple[str, Tensor]]] = []

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        self.given.append(list(weights))


class _Experts(SimpleNamespace):
    """FusedMoE on an H200, with expert 1 of 2 and tensor rank 0 of 2; SGLang 0.5.12's names."""


class _Method:
    load_up_proj_weight_first = False


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What SGLang's modules give."""
    place = SimpleNamespace(location=None)
    contents: dict[str, dict[str, Any]] = {
        "eplb.expert_location": {"get_global_expert_location_metadata": lambda: place.location},
        "layers.moe.fused_moe_triton.layer": {"FusedMoE": _Experts},
        "layers.quantization.unquant": {"UnquantizedFusedMoEMethod": _Method},
        "layers.utils": {"get_layer_id": lambda name: int(name.split("layers.")[1].split(".")[0])},
        "models": {"qwen3_vl_moe": SimpleNamespace(Qwen3VLMoeForConditionalGeneration=_Own)},
    }
    for name, members in contents.items():
        module = ModuleType(f"sglang.srt.{name}")
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    # which its package wants, and not this
    memory = MagicMock()
    monkeypatch.setitem(sys.modules, "prism_megatron.rollout.sglang_server.memory", memory)
    module = importlib.import_module("prism_megatron.rollout.sglang_server.models.qwen3_vl_moe")
    del sys.modules[module.__name__]
    place.model, place.empty = module.EntryClass, _empty(tensor=2, expert=2)
    return place


def _experts(place: SimpleNamespace, **changes: Any) -> Any:
    fields: dict[str, Any] = dict(
        quant_method=_Method(),
        use_presharded_weights=False,
        num_fused_shared_experts=0,
        use_triton_kernels=False,
        use_padded_loading=False,
        moe_ep_rank=1,
        moe_ep_size=2,
        moe_tp_rank=0,
        moe_tp_size=2,
        layer_id=1,
        w13_weight=place.empty[LAYER + "w13_weight"],
        w2_weight=place.empty[LAYER + "w2_weight"],
    )
    return _Experts(**fields | changes)


def _location(numbers: list[int]) -> Any:
    return SimpleNamespace(physical_to_logical_map_cpu=torch.tensor([[9] * len(numbers), numbers]))


def test_sglang_copies_fused_experts_and_loads_the_rest_itself(place: SimpleNamespace) -> None:
    place.location = _location(list(range(EXPERTS)))
    model, sent, wanted = place.model(_experts(place)), _sent(), _empty(tensor=2, expert=2)
    assert place.model.__name__ == "Qwen3VLMoeForConditionalGeneration"
    model.load_weights(list(sent.items()))
    assert model.given == [], "its loader lists all parameters, though nothing is left"
    _one_by_one(wanted, _stored(sent), 0, 1)
    assert all(torch.equal(place.empty[name], wanted[name]) for name in wanted)
    other = "model.visual.merger.norm.weight", torch.ones(2)
    on_disk = LAYER + "gate_up_proj", torch.zeros(EXPERTS, HIDDEN, 2 * FFN)
    model.load_weights([*sent.items(), other, on_disk])
    assert model.given == [[other, on_disk]]


class _Quantised(_Method):
    """Another method than that of BF16."""


def _up_first() -> _Method:
    method = _Method()
    method.load_up_proj_weight_first = True
    return method


class _DeepEP(_Experts):
    """Another layer than FusedMoE."""


@pytest.mark.parametrize(
    "changes",
    [
        {"quant_method": _Quantised()},
        {"quant_method": _up_first()},
        {"kind": _DeepEP},
        {"use_presharded_weights": True},
        {"num_fused_shared_experts": 1},
        {"use_triton_kernels": True},
        {"use_padded_loading": True},
        {"w13_weight": torch.zeros(3, 2 * FFN, HIDDEN), "w2_weight": torch.zeros(3, HIDDEN, 16)},
        {"location": _location([1, 0, 2, 3, 4, 5])},
        {"location": _location([*range(EXPERTS), 0, 1])},
        {"end_layer": 1},
        {"encoder_only": True},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_sglangs_own_loader_gets_what_lies_otherwise_as_a_checkpoint_has_it(
    place: SimpleNamespace, changes: dict[str, Any]
) -> None:
    changed = dict(changes)
    place.location = changed.pop("location", None)
    kind, end = changed.pop("kind", _Experts), changed.pop("end_layer", 2)
    encoder_only = changed.pop("encoder_only", False)
    model = place.model(kind(**vars(_experts(place, **changed))))
    model.model.end_layer, model.config.encoder_only = end, encoder_only
    sent = _sent()
    model.load_weights(iter(sent.items()))
    [given] = model.given
    assert [name for name, _ in given] == [LAYER + "gate_up_proj", LAYER + "down_proj"]
    for (_, tensor), whole in zip(given, sent.values(), strict=True):
        assert torch.equal(tensor, whole.transpose(1, 2))
    assert all(tensor.isnan().all() for tensor in place.empty.values())


def test_vllms_own_loader_gets_them_as_a_checkpoint_has_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loader = "vllm.model_executor.model_loader"
    for name in ("vllm", "vllm.config", f"{loader}.reload", f"{loader}.utils"):
        monkeypatch.setitem(sys.modules, name, MagicMock())
    module = importlib.import_module("prism_megatron.rollout.vllm_server")
    del sys.modules[module.__name__]
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: None)
    worker, model = module.WeightExtension(), _Own(None)
    worker.model_runner = SimpleNamespace(model=model)
    sent, norm = _sent(), ("model.language_model.norm.weight", torch.ones(2))
    worker._load([*sent.items(), norm])
    [[gate_up, down, other]] = model.given
    assert (gate_up[0], down[0]) == (LAYER + "gate_up_proj", LAYER + "down_proj")
    assert torch.equal(gate_up[1], sent[LAYER + "w13_weight"].transpose(1, 2))
    assert torch.equal(down[1], sent[LAYER + "w2_weight"].transpose(1, 2))
    assert other[0] == norm[0] and torch.equal(other[1], norm[1])
