"""RLVR with every algorithm, on real scans: what is sampled, kept, trained and carried on."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoProcessor

from model_providers.weight_plan import iter_hf_weights
from prism_megatron.config import schema
from prism_megatron.data import digit_sums
from prism_megatron.pipelines import rlvr, tiny_model
from prism_megatron.rollout import fleet
from prism_megatron.training.guard import Unsound
from prism_megatron.types import Prompt, Rollout
from tests.dist.ranks import Ranks

Worlds = Callable[[int], Ranks]
SYSTEM_PROMPT = Path(__file__).parents[2] / "configs/quickstart/system_prompt.txt"
ROWS = 12


def clockless(line: dict[str, Any]) -> dict[str, Any]:
    """The metrics that two runs share."""
    return {k: v for k, v in line.items() if k not in ("time", "sync_s") and "time/" not in k}


TRUTHS: list[str] = []


class AnsweringEngine:
    """An engine that gives some prompts right and wrong answers, the others wrong ones alone."""

    asked: ClassVar[list[str]] = []
    before_the_end = ""

    def __init__(self, path: Path, **options: Any) -> None:
        self.tokenizer = AutoProcessor.from_pretrained(path).tokenizer
        self.weight_version = -1

    def generate(
        self, prompts: Sequence[Prompt], sampling: schema.Sampling, step: int
    ) -> list[list[Rollout]]:
        self.asked.extend(prompt.row_id for prompt in prompts)
        return [
            [self._rollout(p, k, k < sampling.n // 2) for k in range(sampling.n)] for p in prompts
        ]

    def _rollout(self, prompt: Prompt, number: int, right: bool) -> Rollout:
        row = int(prompt.row_id.split(":")[1])
        answer = TRUTHS[row] if right and row % 2 else "99"
        text = f"<caption>{number}</caption><think>.</think><answer>{answer}</answer>"
        text += f"{self.before_the_end}<|im_end|>"
        ids = tuple(self.tokenizer(text, add_special_tokens=False).input_ids)
        return Rollout(ids, (-1.0,) * len(ids), "stop", self.weight_version)

    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        assert dict(named_tensors)
        self.weight_version = version


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("rlvr")
    digit_sums.build(schema.DigitSums(out=out / "data", train_rows=ROWS, heldout_rows=2))
    tiny_model.run(
        schema.TinyModel(
            out=out / "tiny", data=out / "data" / "sft.json", system_prompt=SYSTEM_PROMPT
        )
    )
    return out


def _run(root: Path, out: Path, steps: int, **options: Any) -> list[str]:
    rows = rlvr.read_prompts(root / "data" / "prompts.parquet")
    TRUTHS[:] = [rows[i].ground_truth for i in range(len(rows))]
    AnsweringEngine.asked = []
    config = schema.RLVR.model_validate(
        {
            "run": {"dir": out},
            "data": {
                "path": root / "data" / "prompts.parquet",
                "system_prompt": SYSTEM_PROMPT,
                "max_prompt_tokens": 192,
                "max_response_tokens": 64,
            },
            "train": {"steps": steps, "micro_batch_tokens": 1024},
            "policy": {"path": root / "tiny"},
            "policy_optimizer": {"lr": 1e-4},
            "prompts_per_step": 2,
            "sampling": {"n": 4, "max_new_tokens": 80},
        }
        | options
    )
    with (
        mock.patch.object(fleet, "LocalEngine", AnsweringEngine),
        mock.patch.object(rlvr.fleet, "build", ahead if config.rollout.ahead else fleet.build),
    ):
        rlvr.run(config)
    return AnsweringEngine.asked


class AheadFleet(fleet.EmbeddedFleet):
    """Answers with the weights of when it is asked, as engines do that sample meanwhile."""

    def submit(self, prompts: Sequence[Prompt], sampling: schema.Sampling, step: int) -> None:
        super().submit(prompts, sampling, step)
        self.answers = super().collect(self.weight_version)

    def collect(self, version: int) -> list[list[Rollout]]:
        return self.answers


def ahead(config: schema.Rollout, policy: Any, hf_dir: Path, **options: Any) -> fleet.Fleet:
    engine: Any = AnsweringEngine(hf_dir)
    return AheadFleet(engine, lambda: iter_hf_weights(policy))


def _metrics(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def _algorithms(root: Path, out: Path) -> None:
    for name in schema.ALGORITHMS:
        _run(root, out / name, 1, algorithm=name, mini_batches=2, kl_coef=0.01)
        dist.barrier()


def test_every_algorithm_trains(ranks: Worlds, root: Path, tmp_path: Path) -> None:
    ranks(2).run(_algorithms, root, tmp_path)
    losses = set()
    for name in schema.ALGORITHMS:
        [step] = _metrics(tmp_path / name)
        assert step["grad_norm"] > 0 and step["weight_version"] == 1
        assert step["kl"] >= 0 and step["entropy"] > 1
        assert step["stale_share"] == 0
        losses.add(round(step["policy_loss"], 6))
        assert (tmp_path / name / "hf" / "config.json").exists()
    # what they sample is the same but for DAPO, what they make of it is not
    assert len(losses) == len(schema.ALGORITHMS)


def _with_a_control_token(root: Path, out: Path, rules: str) -> None:
    with mock.patch.object(AnsweringEngine, "before_the_end", "<|endoftext|>"):
        _run(root, out, 1, rewards={"rules": rules})


@pytest.mark.parametrize(("rules", "rate"), [("corrected", 0), ("reference", 1)])
def test_the_references_rewards_do_not_see_control_tokens(
    ranks: Worlds, root: Path, tmp_path: Path, rules: str, rate: float
) -> None:
    ranks(1).run(_with_a_control_token, root, tmp_path, rules)
    [step] = _metrics(tmp_path)
    assert step["format_rate"] == rate
    assert (step["accuracy"] > 0) == (rate > 0)


def _recorded(root: Path, out: Path) -> None:
    _run(root, out, 4, samples_every=2)


def test_what_was_sampled_is_there_to_look_at(ranks: Worlds, root: Path, tmp_path: Path) -> None:
    ranks(2).run(_recorded, root, tmp_path)
    files = sorted((tmp_path / "samples").iterdir())
    assert [file.name for file in files] == ["step_000002.jsonl", "step_000004.jsonl"]
    samples = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    assert [sample["response"][9:12] for sample in samples] == ["0</", "1</", "2</", "3</"] * 4
    assert [sample["weight_version"] for sample in samples] == [1] * 8 + [3] * 8
    for sample in samples:
        assert sample["response"].endswith("</answer><|im_end|>")
        assert sample["prompt"].startswith("<|im_start|>system")
        assert sample["prompt"].count("<|image_pad|>") == 1
        assert sample["finish_reason"] == "stop"
        right = sample["accuracy"] == 1
        assert sample["reward"] == pytest.approx(0.8 * right + 0.2)
        assert sample["rule"] and right == (sample["advantage"] > 0)
    assert {sample["accuracy"] for sample in samples} == {0, 1}


def _validated(root: Path, out: Path) -> list[str]:
    validation = {"path": root / "data" / "prompts.parquet", "every": 3, "n": 4, "rows": 10}
    train = {"steps": 5, "micro_batch_tokens": 1024, "keep_best": {"metric": "validation/accuracy"}}
    return _run(root, out, 5, validation=validation, train=train)


def test_held_out_prompts_are_answered_while_it_trains(
    ranks: Worlds, root: Path, tmp_path: Path
) -> None:
    """Half of the prompts get two right answers of four, the others none."""
    shares = ranks(2).run(_validated, root, tmp_path)
    steps = _metrics(tmp_path)
    assert ["validation/accuracy" in step for step in steps] == [False, False, True, False, True]
    odd = [sum(row % 2 for row in rows) for rows in _held_out(shares)]
    for step, number in zip((steps[2], steps[4]), odd, strict=True):
        assert step["validation/accuracy"] == number / 10 / 2
        assert step["validation/best_of_n"] == number / 10
        assert step["validation/format_rate"] == step["validation/finished_rate"] == 1
        assert step["validation/response_tokens"] > 10
    assert odd[0] == odd[1] and 0 < odd[0] < 10


def _held_out(shares: list[list[str]]) -> list[list[int]]:
    """Rows that both ranks' engines were asked for in each validation: the only ten at once."""
    first, second = ([int(name.split(":")[1]) for name in share] for share in shares)
    # a step asks each rank for one of its two prompts, a validation for five of ten
    return [first[3:8] + second[3:8], first[10:15] + second[10:15]]


DAPO = {"algorithm": "dapo", "gen_batch_size": 7}
AHEAD = {"rollout": {"kind": "local", "ahead": True}, "rollout_is": "tis"}


def _split(root: Path, out: Path, steps: int, stop_at: int, options: Any) -> list[list[str]]:
    """All steps at once, and the same with a stop in between."""
    whole = _run(root, out / "whole", steps, **options)
    stop = {"train": {"steps": steps, "micro_batch_tokens": 1024, "stop_at": stop_at}}
    first = _run(root, out / "split", steps, **(options | stop))
    second = _run(root, out / "split", steps, **options)
    return [whole, first, second]


def test_surplus_groups_are_trained_after_a_restart(
    ranks: Worlds, root: Path, tmp_path: Path
) -> None:
    [(whole, first, second)] = ranks(1).run(_split, root, tmp_path, 3, 1, DAPO)
    assert whole == first + second
    # 12 rows hold six prompts that teach something: 7 sampled ones give more than a step needs
    steps, again = _metrics(tmp_path / "whole"), _metrics(tmp_path / "split")
    assert any(step["stale_share"] > 0 for step in steps)
    for one, other in zip(steps, again, strict=True):
        assert clockless(one) == clockless(other)
    saved = tmp_path / "split" / "checkpoints" / "step_000003" / "state.json"
    assert "waiting" in json.loads(saved.read_text())["carried"]


def test_what_is_sampled_ahead_is_trained_after_a_restart(
    ranks: Worlds, root: Path, tmp_path: Path
) -> None:
    [(whole, first, second), _] = ranks(2).run(_split, root, tmp_path, 4, 2, AHEAD)
    assert whole == first + second
    steps, again = _metrics(tmp_path / "whole"), _metrics(tmp_path / "split")
    assert [step["stale_share"] for step in steps] == [0, 1, 1, 1]
    assert [step["weight_version"] for step in steps] == [1, 2, 3, 4]
    for one, other in zip(steps, again, strict=True):
        assert clockless(one) == clockless(other)


def _poisoned_once(root: Path, out: Path) -> list[str]:
    """Four steps sampled ahead with a checkpoint after each; the third update's gradient is broken
    the first time."""
    updates = 0

    def update(model: Any, *args: Any, **options: Any) -> dict[str, float]:
        nonlocal updates
        updates += 1
        parameter = next(model.model.parameters())
        hook = parameter.register_hook(lambda grad: grad * (float("nan") if updates == 3 else 1))
        try:
            return real(model, *args, **options)
        finally:
            hook.remove()

    real = rlvr.policy_update
    train = {"steps": 4, "save_every": 1, "guard": {"action": "rewind"}, "micro_batch_tokens": 1024}
    with mock.patch.object(rlvr, "policy_update", update):
        return _run(root, out, 4, **(AHEAD | {"train": train}))


def test_a_rewound_run_forgets_what_was_sampled_with_the_weights_that_are_gone(
    ranks: Worlds, root: Path, tmp_path: Path
) -> None:
    asked = ranks(1).run(_poisoned_once, root, tmp_path)[0]
    steps = _metrics(tmp_path)
    assert [step["step"] for step in steps] == [1, 2, 3, 4]
    assert [step["weight_version"] for step in steps] == [1, 2, 3, 4]
    # the broken batch and the one that was sampled meanwhile are gone: the third is sampled with
    # the weights that the run went back to
    assert [step["stale_share"] for step in steps] == [0, 1, 0, 1]
    # batches of two rows: two trained, two forgotten, two trained
    assert len(asked) == 12 == len(set(asked))


def _broken(root: Path, out: Path, what: str, broken: Collection[int], limit: int) -> str:
    """Six steps of two updates each, in some of which gradients, or the images from which old
    log-probabilities are inferred, are broken; what the run ends with."""
    steps = 0

    def update(model: Any, samples: Any, *args: Any, **options: Any) -> dict[str, float]:
        nonlocal steps
        steps += 1
        if steps in broken and what == "images":
            samples = [(_without_image(prompt), rollout) for prompt, rollout in samples]
        factor = float("nan") if steps in broken else 1.0
        hook = next(model.model.parameters()).register_hook(lambda grad: grad * factor)
        try:
            return real(model, samples, *args, **options)
        finally:
            hook.remove()

    real = rlvr.policy_update
    guard = {"action": "skip", "limit": limit}
    train = {"steps": 6, "micro_batch_tokens": 1024, "guard": guard}
    try:
        with mock.patch.object(rlvr, "policy_update", update):
            _run(root, out, 6, mini_batches=2, train=train)
    except Unsound as error:
        return str(error)
    return ""


def _without_image(prompt: Prompt) -> Prompt:
    """The prompt with an image that is not a number."""
    [image] = prompt.images
    return replace(
        prompt, images=(replace(image, patches=torch.full_like(image.pixel_values, torch.nan)),)
    )


def test_a_step_that_breaks_off_where_nothing_can_be_inferred_is_one_without_updates(
    ranks: Worlds, root: Path, tmp_path: Path
) -> None:
    refused, inferred = tmp_path / "refused", tmp_path / "inferred"
    [words, _] = ranks(2).run(_broken, root, refused, "gradients", (2, 4, 5), 2)
    assert words.startswith("step 5 of refused: grad_norm is nan"), words
    [words, _] = ranks(2).run(_broken, root, inferred, "images", (2, 4, 5), 1)
    assert words.startswith("step 5 of inferred: sequence 0 of ") and "NaN or infinity" in words
    assert "1 updates in a row were skipped before (train.guard.limit)" in words
    by_update, by_step = _metrics(refused), _metrics(inferred)
    assert [step["skipped_updates"] for step in by_update] == [0, 2, 0, 2]
    assert [step["skipped_updates"] for step in by_step] == [0, 1, 0, 1]
    assert "reward" in by_update[1] and "reward" not in by_step[1]
    # the engine has the next version nevertheless, and samples the same
    for step in (0, 2):
        assert clockless(by_update[step]) == clockless(by_step[step])


def _to_the_end(root: Path, out: Path) -> None:
    _run(root, out, 50, dynamic_sampling=True, max_epochs=1)
    # a run at its end stays there
    _run(root, out, 50, dynamic_sampling=True, max_epochs=1)


def test_the_end_of_the_data_ends_the_run_with_an_export(
    ranks: Worlds, root: Path, tmp_path: Path
) -> None:
    ranks(1).run(_to_the_end, root, tmp_path)
    # six prompts teach something, two a step
    steps = _metrics(tmp_path)
    assert [step["step"] for step in steps] == [1, 2, 3]
    assert (tmp_path / "checkpoints" / "step_000003" / "state.json").exists()
    assert (tmp_path / "hf" / "config.json").exists()
