"""What a stage asks for is checked before it joins the world, and reaches the model as asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from model_providers.config import Precision, Recompute, TrainingOptions
from model_providers.parallel import Layout
from prism_megatron import environment, plan
from prism_megatron.config import schema
from prism_megatron.training import setup
from tests import tiny_models


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fp8": "blockwise"}, "fp8='blockwise' needs Transformer Engine"),
        ({"bf16_first_layers": 1}, "mean something with fp8 only"),
        ({"bf16_last_layers": 1}, "mean something with fp8 only"),
        ({"fp8_param_gather": True}, "holds weights as fp8 computes with them, but fp8 is null"),
        ({"offload_layers": 1}, "offload_layers=1 moves activations from a GPU to the host"),
        (
            {"recompute": {"granularity": "selective", "modules": ["layernorm"]}},
            "backend 'cpu' can't recompute layernorm",
        ),
    ],
)
def test_a_second_model_is_refused_before_the_first_collective(
    tmp_path: Path, options: dict[str, object], message: str
) -> None:
    path = tiny_models.save(tmp_path, "dense")
    config = _game(tmp_path, path, discriminator={"path": path, **options})
    with pytest.raises(ValueError, match=f"discriminator \\({path}\\): .*{message}"):
        setup.start(config)
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"policy": {"fp8": "delayed", "parallel": {"pipeline": 2}}}, "fp8='delayed' reduces its"),
        ({"policy": {"offload_layers": 36}}, "offload_layers=36, but the last of 36 decoder"),
        ({"policy": {"dispatcher": "deepep"}}, "sends tokens to experts .* there are 0 experts"),
        ({"policy": {"parallel": {"tensor": 3}}}, "attention heads can't be split in 3"),
        (
            {"discriminator": {"recompute": {"granularity": "selective", "modules": ["mlp"]}}},
            "has mlp",
        ),
        (
            {"router_replay": "R2", "mini_batches": 2},
            "router_replay=R2, but Qwen3-VL-4B-Instruct is dense; leave",
        ),
    ],
)
def test_a_plan_refuses_what_a_run_would_refuse(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    """On a host without GPUs, and without what a dispatcher needs."""
    config = _game(tmp_path, Path("Qwen3-VL-4B-Instruct"), backend="cuda", **changes)
    with pytest.raises(ValueError, match=message):
        list(plan.lines(config, 6))
    expert = {"parallel": {"expert": 2}, "dispatcher": "hybridep", "fp8": "blockwise"}
    own = _game(tmp_path, Path("Qwen3-VL-4B-Instruct"), backend="cuda", discriminator=expert)
    assert list(plan.lines(own, 4))


def test_optimizers_that_a_host_has_no_room_for_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "free_memory", lambda: int(300e9))
    offload = {"lr": 1e-3, "offload": True}
    path = Path("Qwen3-VL-32B-Instruct")
    config = _game(tmp_path, path, backend="cuda", policy_optimizer=offload)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    plan.check_host(config, 16)
    # 12 bytes of each of 33.4e9 parameters, shared by 16 ranks
    message = r"has 300.0 GB .* its 8 rank.* want 48\d.\d GB: 50.\d GB of optimizer state each"
    with pytest.raises(ValueError, match=message):
        plan.check_host(config, 8)


def _game(folder: Path, path: Path, **changes: Any) -> schema.Align:
    model = {"policy": {}, "discriminator": {}} | changes
    moe = path.with_name("Qwen3-VL-30B-A3B-Instruct") if not path.exists() else path
    return schema.Align.model_validate(
        {
            "run": {"dir": folder},
            "data": {"path": "x.parquet", "system_prompt": "x.txt"},
            "train": {"steps": 3},
            "sampling": {"n": 2, "max_new_tokens": 64},
            "policy_optimizer": {"lr": 1e-3},
            "discriminator_optimizer": {"lr": 1e-3},
            "prompts_per_step": 4,
        }
        | model
        | {
            "policy": {"path": path} | model["policy"],
            "discriminator": {"path": moe} | model["discriminator"],
        }
    )


def test_a_host_that_is_not_fit_is_refused_before_the_first_collective(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no0")
    with pytest.raises(ValueError, match="GLOO_SOCKET_IFNAME=no0 names no interface"):
        setup.start(_game(tmp_path, tmp_path))
    assert not dist.is_initialized()


def test_a_section_says_how_its_model_is_trained() -> None:
    section = schema.Model(
        path=Path("model"),
        recompute=schema.Recompute(granularity="full", layers=3, vision=True),
        fp8="tensorwise",
        bf16_first_layers=1,
        bf16_last_layers=2,
        fp8_param_gather=True,
        offload_layers=7,
    )
    assert setup.options_of(section, 0.25, 0.125) == TrainingOptions(
        aux_loss_coef=0.25,
        z_loss_coef=0.125,
        recompute=Recompute("full", (), 3, vision=True),
        offload_layers=7,
        precision=Precision("tensorwise", 1, 2, param_gather=True),
    )
    assert setup.options_of(schema.Model(path=Path("model"))) == TrainingOptions()


def test_every_key_of_the_configuration_reaches_the_layout() -> None:
    sizes: dict[str, Any] = dict(
        tensor=2,
        context=3,
        pipeline=5,
        virtual_pipeline=7,
        expert=11,
        expert_tensor=13,
        first_stage_layers=17,
        last_stage_layers=19,
        embedding_as_layer=True,
        loss_as_layer=True,
        vision="replicated",
    )
    assert setup.layout_of(schema.Parallel(**sizes)) == Layout(**sizes, sequence_parallel=True)
    assert setup.layout_of(schema.Parallel(tensor=2, sequence=False)) == Layout(tensor=2)
    assert setup.layout_of(schema.Parallel()) == Layout()
