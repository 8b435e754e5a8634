"""Warm-up and alignment with every discriminator that the configuration offers, on real scans."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoProcessor

from checkpoint_tools.upcycle import upcycle
from model_providers.config import Qwen3VLConfig
from prism_megatron.config import schema
from prism_megatron.data import digit_sums
from prism_megatron.data.rows import PairRow, read_prompts, write_pairs
from prism_megatron.pipelines import alignment, tiny_model, warmup
from prism_megatron.rollout import fleet
from prism_megatron.types import Prompt, Rollout
from tests.dist.ranks import Ranks

Worlds = Callable[[int], Ranks]
SYSTEM_PROMPT = Path(__file__).parents[2] / "configs/quickstart/system_prompt.txt"
STUDENT = ("<caption>0 0</caption>", "<think>0+0=0</think><answer>0</answer>")
RESPONSES = ["".join(STUDENT), "<caption>7 0</caption>" + STUDENT[1], "".join(STUDENT), "no tags"]
"""Sampled answers, whatever the prompt; the last is ill-formed."""

VARIANTS = {
    "shared": ("shared", {}, ("caption", "reasoning")),
    "dedicated": ("dedicated", {}, ("caption", "reasoning")),
    "dense": ("dense", {}, ("caption", "reasoning")),
    "text-only": ("shared", {"text_only": True}, ("caption", "reasoning")),
    "whole-response": ("shared", {"streams": "response"}, ("response",)),
}


class ScriptedEngine:
    """An engine whose policy always gives RESPONSES; weights are received as by any engine."""

    def __init__(self, path: Path, **options: Any) -> None:
        self.tokenizer = AutoProcessor.from_pretrained(path).tokenizer
        self.weight_version = -1

    def generate(
        self, prompts: Sequence[Prompt], sampling: schema.Sampling, step: int
    ) -> list[list[Rollout]]:
        return [[self._rollout(text) for text in RESPONSES] for _ in prompts]

    def _rollout(self, text: str) -> Rollout:
        ids = tuple(self.tokenizer(text + "<|im_end|>", add_special_tokens=False).input_ids)
        return Rollout(ids, (-1.0,) * len(ids), "stop", self.weight_version)

    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        assert dict(named_tensors)
        self.weight_version = version


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data/, the tiny model, pairs.jsonl, and a discriminator of every architecture."""
    out = tmp_path_factory.mktemp("judging")
    digit_sums.build(schema.DigitSums(out=out / "data", train_rows=12, heldout_rows=2))
    tiny_model.run(
        schema.TinyModel(
            out=out / "tiny", data=out / "data" / "sft.json", system_prompt=SYSTEM_PROMPT
        )
    )
    rows = read_prompts(out / "data" / "prompts.parquet")
    write_pairs(out / "pairs.jsonl", (_pair(rows[i]) for i in range(len(rows))))
    for architecture in ("shared", "dedicated", "dense"):
        upcycle(out / "tiny", out / architecture, 4, 2, 0.01, 0.02, 3, architecture)
    return out


def _pair(row: Any) -> PairRow:
    return PairRow(
        row.row_id, row.messages, row.images, row.teacher_caption, STUDENT[0], row.teacher_cot,
        STUDENT[1],
    )  # fmt: skip


def _stage(root: Path, out: Path, data: str, steps: int) -> dict[str, Any]:
    limits = {"max_prompt_tokens": 192, "max_response_tokens": 64}
    return {
        "run": {"dir": out},
        "data": {"path": root / data, "system_prompt": SYSTEM_PROMPT, **limits},
        "train": {"steps": steps, "micro_batch_tokens": 1024},
    }


def _discriminator(path: Path, variant: str) -> dict[str, Any]:
    architecture, options, _ = VARIANTS[variant]
    return {"path": path, "parallel": {"expert": 1 if architecture == "dense" else 2}, **options}


def _warmup(root: Path, out: Path, variant: str) -> None:
    warmup.run(
        schema.Warmup.model_validate(
            _stage(root, out, "pairs.jsonl", 16)
            | {
                "model": _discriminator(root / VARIANTS[variant][0], variant),
                "optimizer": {"lr": 1e-3},
                "batch_size": 6,
            }
        )
    )


def _align(root: Path, out: Path, judge: Path, variant: str, **options: Any) -> None:
    with mock.patch.object(fleet, "LocalEngine", ScriptedEngine):
        alignment.run(
            schema.Align.model_validate(
                _stage(root, out, "data/prompts.parquet", 2)
                | {
                    "policy": {"path": root / "tiny", "parallel": {"tensor": 2}},
                    "policy_optimizer": {"lr": 1e-4},
                    "discriminator": _discriminator(judge, variant),
                    "discriminator_optimizer": {"lr": 1e-4},
                    "prompts_per_step": 3,
                    "sampling": {"n": len(RESPONSES)},
                }
                | options
            )
        )


def _metrics(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("variant", VARIANTS)
def test_warm_up_and_alignment_with_every_discriminator(
    ranks: Worlds, root: Path, tmp_path: Path, variant: str
) -> None:
    architecture, _, streams = VARIANTS[variant]
    ranks(2).run(_warmup, root, tmp_path / "warmup", variant)
    steps = _metrics(tmp_path / "warmup")
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=0.1)
    # the student always says the same
    assert steps[-1]["loss"] < 0.3
    assert steps[-1]["accuracy"] > 0.9
    found = {key.removesuffix("_accuracy") for key in steps[0] if key.endswith("_accuracy")}
    assert found == set(streams)
    assert ("aux_loss" in steps[0]) == (architecture != "dense")
    trained = tmp_path / "warmup" / "hf"
    config = Qwen3VLConfig.from_hf(trained)
    assert config.dedicated == (architecture == "dedicated")
    weights = load_file(trained / "model.safetensors")
    assert {name for name in weights if name.startswith("v_head")} == set(config.value_heads)

    ranks(2).run(_align, root, tmp_path / "align", trained, variant)
    steps = _metrics(tmp_path / "align")
    assert [step["weight_version"] for step in steps] == [1, 2]
    for step in steps:
        assert step["format_rate"] == 0.75
        assert step["score_gap"] > 0.5
        assert step["discriminator_accuracy"] > 0.9
        assert {f"{name}_accuracy" for name in streams} <= set(step)
        gaps = [step[f"teacher_{n}_score"] - step[f"student_{n}_score"] for n in streams]
        assert step["score_gap"] == pytest.approx(sum(gaps) / len(gaps), abs=1e-4)
    judged = {key.removesuffix("_accuracy") for key in steps[0] if key.endswith("_accuracy")}
    assert judged == {*streams, "discriminator"}


OPTIONS = {
    "reference": {
        "invalid_samples": "reference",
        "pair_counts": "reference",
        "teacher_length": "reference",
        "section_ends": "reference",
        "positions": "reference",
        "token_mean": "reference",
        "aux_loss_coef": 0.0,
    },
    "corrected": {
        "advantage_mode": "sign_align",
        "discriminator_updates": 2,
        "gradient_penalty_coef": 1.0,
        "gradient_penalty_std": 0.1,
        "score_length_correction_beta": 0.5,
        "kl_coef": 0.1,
        "entropy_coef": 0.01,
        "epochs": 2,
        "alarms": {"load_entropy_below": 0.9999, "accuracy_above": None, "patience": 1},
    },
}


def _align_with(root: Path, out: Path, name: str) -> None:
    _align(root, out, root / "shared", "shared", **OPTIONS[name])


@pytest.mark.parametrize("name", OPTIONS)
def test_alignment_with_the_options_of_reference_and_corrected_method(
    ranks: Worlds, root: Path, tmp_path: Path, name: str
) -> None:
    ranks(2).run(_align_with, root, tmp_path, name)
    for step in _metrics(tmp_path):
        assert step["policy_grad_norm"] > 0 and step["discriminator_grad_norm"] > 0
        assert 0 < step["load_entropy"] < 1
        assert step["entropy"] > 1
        # every response says 0, which is wrong for all but a prompt or two
        assert ("accuracy" in step) == ("kl" in step) == (name == "corrected")
        assert step["alarms"] == (name == "corrected")
        if name == "corrected":
            # an untrained head says little: the length counts
            assert step["reward_reasoning"] < step["student_reasoning_score"] - 1
    assert step["score_gap"] != 0


def _ill_formed(root: Path, out: Path) -> None:
    with mock.patch(f"{__name__}.RESPONSES", ["no tags", "no <caption>"]):
        _align(root, out, root / "shared", "shared")


def test_a_step_without_a_well_formed_response_invents_no_metric(
    ranks: Worlds, root: Path, tmp_path: Path
) -> None:
    ranks(2).run(_ill_formed, root, tmp_path)
    for step in _metrics(tmp_path):
        assert step["format_rate"] == 0
        judged = ("accuracy", "gap", "student", "reward", "discriminator")
        assert [name for name in step if any(part in name for part in judged)] == []


def _refused(root: Path, out: Path) -> str:
    config = schema.Warmup.model_validate(
        _stage(root, out, "pairs.jsonl", 1)
        | {
            "model": {"path": root / "dedicated", "streams": "response"},
            "optimizer": {"lr": 1e-3},
            "batch_size": 2,
        }
    )
    try:
        warmup.run(config)
    except ValueError as error:
        return str(error)
    return "ran"


def test_a_dedicated_discriminator_cannot_judge_a_whole_response(
    ranks: Worlds, root: Path, tmp_path: Path
) -> None:
    [message] = ranks(1).run(_refused, root, tmp_path / "run")
    assert "dedicated discriminator" in message
    assert "set streams=sections, or upcycle with architecture=shared" in message
    assert not (tmp_path / "run").exists()
