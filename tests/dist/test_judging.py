"""Warm-up and alignment with every discriminator that the configuration offers, on real scans."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional
from transformers import AutoProcessor

from checkpoint_tools.upcycle import upcycle
from model_providers.architecture import Qwen3VLConfig
from prism_megatron.config import schema
from prism_megatron.data import digit_sums
from prism_megatron.data.rows import PairRow, read_prompts, write_pairs
from prism_megatron.pipelines import alignment, tiny_model, warmup
from prism_megatron.rollout import fleet
from prism_megatron.training import discriminator
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
                    "sampling": {"n": len(RESPONSES), "max_new_tokens": 64},
                    "samples_every": 2,
                    "validation": {
                        "path": root / "data/heldout.parquet",
                        "every": 2,
                        "n": len(RESPONSES),
                    },
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
    [saved] = (tmp_path / "warmup" / "checkpoints").glob("step_*/discriminator/hf")
    for folder in (trained, saved):
        shown = json.loads((folder / "config.json").read_text())["prism_discriminator"]
        given = schema.Discriminator(**_discriminator(trained, variant))
        assert shown["architecture"] == architecture
        assert (shown["streams"], shown["text_only"]) == (given.streams, given.text_only)
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
    assert [step.get("validation/format_rate") for step in steps] == [None, 0.75]
    [file] = (tmp_path / "align/samples").iterdir()
    assert file.name == "step_000002.jsonl"
    samples = [json.loads(line) for line in file.read_text().splitlines()]
    assert [sample["response"] for sample in samples] == [
        f"{text}<|im_end|>" for text in RESPONSES
    ] * 3
    for name in streams:
        # what the metrics say of all of them, each with its own teacher
        of_valid = [s[f"{name}_score"] for s in samples if s["valid"]]
        assert sum(of_valid) / len(of_valid) == pytest.approx(steps[1][f"student_{name}_score"])
        teachers = {s["row"]: s[f"teacher_{name}_score"] for s in samples}
        mean = sum(teachers.values()) / len(teachers)
        assert len(teachers) == 3 and mean == pytest.approx(steps[1][f"teacher_{name}_score"])


def _contradicts(root: Path, out: Path, judge: Path) -> str:
    """What alignment says of a discriminator that was warmed up on sections."""
    try:
        _align(root, out, judge, "shared", discriminator={"path": judge, "streams": "response"})
    except ValueError as error:
        return str(error)
    return "ran"


def test_alignment_shows_the_discriminator_what_it_was_warmed_up_on(
    ranks: Worlds, root: Path, tmp_path: Path
) -> None:
    section = schema.Discriminator(path=root / "shared")
    judge = discriminator.record_shown(section, tmp_path / "judge")
    [said] = ranks(1).run(_contradicts, root, tmp_path / "align", judge)
    assert 'discriminator.streams="response", but' in said
    assert f'{judge} was warmed up with model.streams="sections"' in said
    assert not (tmp_path / "align").exists()


OPTIONS = {
    "reference": {
        "invalid_samples": "reference",
        "response_format": "reference",
        "student_tokens": "reference",
        "regularised_scores": "reference",
        "fallback_loss": "reference",
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
    """Each update has to get the scores and expert loads of its own sequences and weights."""
    update = discriminator.update

    def checked(model: Any, sequences: Any, scores: Tensor, loads: Tensor, objective: Any) -> Any:
        torch.testing.assert_close(discriminator.score(model, sequences), scores)
        assert torch.equal(model.loads, loads)
        return update(model, sequences, scores, loads, objective)

    with mock.patch.object(discriminator, "update", checked):
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


def _align_in_two_parts(root: Path, out: Path) -> None:
    options = {"alarms": {"load_entropy_below": 0.9999, "accuracy_above": None, "patience": 2}}
    train = {"steps": 2, "micro_batch_tokens": 1024}
    _align(root, out, root / "shared", "shared", train=train | {"stop_at": 1}, **options)
    _align(root, out, root / "shared", "shared", train=train, **options)


def test_an_alarm_counts_steps_over_a_restart(ranks: Worlds, root: Path, tmp_path: Path) -> None:
    ranks(2).run(_align_in_two_parts, root, tmp_path)
    assert [step["alarms"] for step in _metrics(tmp_path)] == [0, 1]


LONG = "no tags but words " * 12
SWITCHED = [RESPONSES[0], "<caption></caption>\n" + STUDENT[1], LONG, LONG + "and more"]
"""Valid, valid by the reference's format alone, invalid, invalid."""
Update = tuple[list[torch.Tensor], Tensor, float, Tensor]
"""Tokens of the discriminator's sequences, their scores, the loss, its gradient by the scores."""


def _switched(root: Path, out: Path, responses: list[str]) -> tuple[Any, list[Update]]:
    """A step's micro-batches, and its updates, of two on different dropouts."""
    updates: list[Update] = []
    plans = []
    update, plan = discriminator.update, alignment.plan_micro_batches

    def recorded(model: Any, sequences: Any, scores: Tensor, loads: Tensor, objective: Any) -> Any:
        leaf = scores.clone().requires_grad_()
        loss = objective(leaf)
        loss.backward()
        ids = [s.input_ids[s.response_mask] for s in sequences]
        updates.append((ids, scores, float(loss), leaf.grad))
        assert all(s.dropout is not None and s.dropout.rate == 0.1 for s in sequences)
        return update(model, sequences, scores, loads, objective)

    def planned(*args: Any, **kwargs: Any) -> Any:
        plans.append(plan(*args, **kwargs))
        return plans[-1]

    judge = _discriminator(root / "shared", "shared")
    judge |= {"score_dropout": "reference", "score_bound": "clip", "score_limit": 0.7}
    with (
        mock.patch(f"{__name__}.RESPONSES", responses),
        mock.patch.object(discriminator, "update", recorded),
        mock.patch.object(alignment, "plan_micro_batches", planned),
    ):
        stage = _stage(root, out, "", 1)
        _align(
            root,
            out,
            root / "shared",
            "shared",
            train=stage["train"] | {"micro_batch_tokens": 256},
            discriminator=judge,
            discriminator_updates=2,
            score_reg_coef=0.5,
            **OPTIONS["reference"],
        )
    return plans[0], updates


def _critic_loss(scores: Tensor, plan: Any, groups: list[int], valid: Tensor) -> tuple[Tensor, int]:
    """update_critic of the reference's dp_critic.py, rank by rank and micro-batch by micro-batch,
    and how many of these have no valid response anywhere."""
    prompts, count = max(groups) + 1, len(groups)
    sides = []
    for own in scores.chunk(2):
        student = torch.zeros(count)
        student[valid], student[~valid] = own[prompts:].split(
            [int(valid.sum()), int((~valid).sum())]
        )
        sides.append((own[:prompts][groups].clamp(-0.7, 0.7), student.clamp(-0.7, 0.7)))
    total, fallbacks = torch.zeros(()), 0
    for together in zip(*plan, strict=True):
        has_valid = bool(valid[[i for members in together for i in members]].any())
        for members in filter(None, together):
            weights = valid[members].float()
            pairs, squares = torch.zeros(()), torch.zeros(())
            for teacher, student in sides:
                t, s = teacher[members], student[members]
                squares = squares + t.pow(2).mean() + s.pow(2).mean()
                losses = -functional.logsigmoid(t - s) * weights
                paired = losses.sum() / weights.sum().clamp_min(1)
                fallback = -0.01 * functional.logsigmoid(t.mean())
                pairs = pairs + (paired if has_valid else fallback)
            fallbacks += not has_valid
            total = total + (pairs + 0.5 * squares / 4) * len(members) / count
    return total, fallbacks


@pytest.mark.parametrize("responses", [SWITCHED, [LONG, "no tags", LONG]])
def test_the_discriminators_loss_is_the_references(
    ranks: Worlds, root: Path, tmp_path: Path, responses: list[str]
) -> None:
    plan, updates = ranks(2).run(_switched, root, tmp_path, responses)[0]
    size, tokenizer = len(responses), AutoProcessor.from_pretrained(root / "tiny").tokenizer
    groups = [prompt for prompt in range(3) for _ in responses]
    valid = torch.tensor([text.startswith("<caption>") for text in responses] * 3)
    assert len(updates) == 2
    for ids, scores, loss, gradient in updates:
        leaf = scores.clone().requires_grad_()
        wanted, fallbacks = _critic_loss(leaf, plan, groups, valid)
        wanted.backward()
        assert fallbacks > 0, plan
        assert loss == pytest.approx(float(wanted.detach()), rel=1e-5)
        assert leaf.grad is not None
        torch.testing.assert_close(gradient, leaf.grad, atol=1e-8, rtol=1e-4)
        assert int((gradient != 0).sum()) > 1, scores
        # the sampled tokens, valid ones' first; the halves of the others
        caption, reasoning = ids[3 : 3 + 3 * size], ids[-3 * size :]
        order = sorted(range(3 * size), key=lambda i: not valid[i])
        for i, left, right in zip(order, caption, reasoning, strict=True):
            text = responses[i % size]
            sampled = tokenizer(text + "<|im_end|>", add_special_tokens=False).input_ids
            assert [*left.tolist(), *right.tolist()] == sampled
            if not valid[i]:
                assert len(left) == len(sampled) // 2
            else:
                assert "</caption>" in tokenizer.decode(left)
                assert "</caption>" not in tokenizer.decode(left[:-1])
    assert not torch.equal(updates[0][1], updates[1][1])
    [step] = _metrics(tmp_path)
    assert step["format_rate"] == float(valid.float().mean())
    assert step["discriminator_loss"] == pytest.approx(updates[0][2])
    assert ("discriminator_accuracy" in step) == bool(valid.any())


def _warmed_up(root: Path, out: Path) -> list[tuple[list[Any], Tensor]]:
    """Sequences and scores of five updates with the reference's warm-up."""
    updates: list[tuple[list[Any], Tensor]] = []
    update = discriminator.update

    def recorded(model: Any, sequences: Any, scores: Tensor, loads: Tensor, objective: Any) -> Any:
        updates.append((sequences, scores))
        return update(model, sequences, scores, loads, objective)

    switches = {"score_dropout": "reference", "score_precision": "reference"}
    config = schema.Warmup.model_validate(
        _stage(root, out, "pairs.jsonl", 5)
        | {
            "model": _discriminator(root / "shared", "shared") | switches,
            "optimizer": {"lr": 1e-3},
            "batch_size": 6,
            "section_ends": "reference",
            "last_token": "reference",
        }
    )
    with mock.patch.object(discriminator, "update", recorded):
        warmup.run(config)
    return updates


def test_the_warm_up_with_the_references_scores(ranks: Worlds, root: Path, tmp_path: Path) -> None:
    tokenizer = AutoProcessor.from_pretrained(root / "tiny").tokenizer
    updates = ranks(2).run(_warmed_up, root, tmp_path)[0]
    for sequences, scores in updates:
        # six rows, two streams, two sides
        assert len(sequences) == len(scores) == 24
        assert torch.equal(scores, scores.bfloat16().float())
        ends = {tokenizer.decode(s.input_ids)[-len(">\n") :] for s in sequences}
        assert ends == {">\n"}
        assert len({s.dropout for s in sequences}) == 24
    everything = [s for sequences, _ in updates for s in sequences]
    assert len({s.dropout for s in everything}) == len(everything) == 24 * 5
    assert any(s.scored not in (None, len(s) - 1) for s in everything)


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
        named = [name for name in step if not name.startswith("validation/")]
        assert [name for name in named if any(part in name for part in judged)] == []


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
