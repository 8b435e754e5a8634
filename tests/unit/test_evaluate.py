"""The evaluate stage on a random tiny model, and its marking of responses by hand."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow.parquet as pq
import pytest
import torch
from transformers import Qwen3VLForConditionalGeneration

from checkpoint_tools import tiny_qwen3vl
from prism_megatron.config import schema
from prism_megatron.data import digit_sums
from prism_megatron.data.prompts import PromptEncoder
from prism_megatron.data.rows import Message, PromptRow, read_prompts
from prism_megatron.objectives.rewards.scorer import Scorer
from prism_megatron.pipelines import evaluate
from prism_megatron.pipelines.evaluate import ScoredRow, score_response, summarise
from prism_megatron.rollout.rewards import reward_item

NUM_ROWS = 7


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data")
    digit_sums.build(schema.DigitSums(out=out, train_rows=4, heldout_rows=NUM_ROWS))
    return out / "heldout.parquet"


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tiny") / "hf"
    texts = [digit_sums.demonstration("sum", (a, b)) for a in range(10) for b in range(10)]
    tiny_qwen3vl.create(out, texts, "Answer in sections.", vocab_size=320, seed=3)
    return out


def config(tmp_path: Path, model_dir: Path, data: Path, **changes: object) -> schema.Evaluate:
    values: dict[str, object] = {
        "run": schema.Run(dir=tmp_path / "sft", seed=11),
        "data": schema.Data(path=data, max_bad_share=0.5),
        "model": model_dir,
        "stage": "sft",
        "max_new_tokens": 6,
        "batch_size": 3,
    }
    return schema.Evaluate(**{**values, **changes})  # type: ignore[arg-type]


def results(config: schema.Evaluate) -> tuple[dict, list[dict]]:
    lines = (config.run.dir / "eval_rows.jsonl").read_text().splitlines()
    return json.loads((config.run.dir / "eval.json").read_text()), [json.loads(x) for x in lines]


def test_responses_are_the_greedy_ones_of_a_full_forward(
    tmp_path: Path, model_dir: Path, data: Path
) -> None:
    settings = config(tmp_path, model_dir, data)
    evaluate.run(settings)
    _, rows = results(settings)
    encoder = PromptEncoder.from_config(model_dir, settings.data)
    model = Qwen3VLForConditionalGeneration.from_pretrained(model_dir).eval()
    for row, found in zip(read_prompts(data), rows, strict=True):
        prompt = encoder.encode_prompt(row)
        ids = list(prompt.input_ids)
        for _ in range(settings.max_new_tokens):
            input_ids = torch.tensor([ids])
            with torch.no_grad():
                logits = model(
                    input_ids=input_ids,
                    mm_token_type_ids=(input_ids == encoder.image_token_id).long(),
                    pixel_values=prompt.images[0].pixel_values,
                    image_grid_thw=torch.tensor([prompt.images[0].grid_thw]),
                ).logits
            ids.append(int(logits[0, -1].argmax()))
            if ids[-1] in (encoder.end_id, encoder.pad_id):
                break
        response = tuple(ids[len(prompt.input_ids) :])
        assert found["response"] == encoder.decode(response)
        assert found["response_tokens"] == len(response)


@pytest.mark.parametrize(("rules", "right"), [("corrected", 0), ("reference", NUM_ROWS)])
def test_the_reference_rules_do_not_see_control_tokens(
    tmp_path: Path, model_dir: Path, data: Path, rules: str, right: int
) -> None:
    rewards = schema.Rewards.model_validate({"rules": rules, "workers": 1})
    settings = config(tmp_path, model_dir, data, rewards=rewards)
    encoder = PromptEncoder.from_config(model_dir, settings.data)

    def answers(*arguments: Any) -> Iterator[tuple[evaluate.Example, tuple[int, ...]]]:
        for example in arguments[2]:
            text = f"<caption>c</caption><think>t</think><answer>{example.row.ground_truth}"
            start, end = (encoder.encode_section(t) for t in (text, "</answer>"))
            control = min(encoder.control_ids - {encoder.end_id})
            yield example, (*start, control, *end, encoder.end_id)

    with mock.patch.object(evaluate, "greedy_responses", answers):
        evaluate.run(settings)
    _, rows = results(settings)
    assert sum(row["answer_correct"] for row in rows) == right
    # what is written down is what was sampled
    assert all("<|" in row["response"] for row in rows)


def test_the_result_says_what_was_evaluated(tmp_path: Path, model_dir: Path, data: Path) -> None:
    settings = config(tmp_path, model_dir, data)
    evaluate.run(settings)
    result, rows = results(settings)
    assert (result["stage"], result["rows"], result["seed"]) == ("sft", NUM_ROWS, 11)
    assert (result["model"], result["data"]) == (str(model_dir), str(data))
    assert {"torch", "megatron-core", "transformers", "python"} <= result["versions"].keys()
    assert {"git_commit", "git_dirty"} <= result.keys()
    assert result["metrics"]["answer_accuracy"]["count"] == NUM_ROWS
    assert [row["row_id"] for row in rows] == [f"heldout:{i}" for i in range(NUM_ROWS)]
    assert "<image>" not in rows[0]["question"]


def test_the_batch_size_changes_nothing(tmp_path: Path, model_dir: Path, data: Path) -> None:
    found = []
    for size in (1, 64):
        settings = config(tmp_path / str(size), model_dir, data, batch_size=size)
        evaluate.run(settings)
        found.append(results(settings)[1])
    assert found[0] == found[1]


def test_an_answer_that_was_cut_off_is_none_as_in_training(
    tmp_path: Path, model_dir: Path, data: Path
) -> None:
    """All but the first are right and ended."""
    settings = config(tmp_path, model_dir, data)

    def answers(model: object, encoder: PromptEncoder, examples: list[Any], config: object) -> Any:
        for number, example in enumerate(examples):
            answer = f"<answer>{example.row.ground_truth}</answer>"
            text = f"<caption>.</caption><think>.</think>{answer}"
            yield example, encoder.encode_response(text)[: None if number else -1]

    with mock.patch.object(evaluate, "greedy_responses", answers):
        evaluate.run(settings)
    _, rows = results(settings)
    assert [row["answer_correct"] for row in rows] == [False] + [True] * (NUM_ROWS - 1)
    assert [row["format_correct"] for row in rows] == [row["finished"] for row in rows]


def spoil_image(data: Path, folder: Path) -> Path:
    table = pq.read_table(data)
    rows = table.to_pylist()
    rows[2]["images"] = [{"bytes": b"no image", "path": None}]
    spoilt = folder / "spoilt.parquet"
    pq.write_table(type(table).from_pylist(rows, schema=table.schema), spoilt)
    return spoilt


def test_an_unreadable_image_is_quarantined_and_counted(
    tmp_path: Path, model_dir: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = config(tmp_path, model_dir, spoil_image(data, tmp_path))
    for _ in range(2):
        evaluate.run(settings)
        result, rows = results(settings)
        assert (result["rows"], result["quarantined"], len(rows)) == (NUM_ROWS - 1, 1, NUM_ROWS - 1)
    [line] = (settings.run.dir / "eval_quarantine.jsonl").read_text().splitlines()
    assert json.loads(line)["row"] == "spoilt:2"
    assert "1 rows quarantined" in capsys.readouterr().out


def test_too_many_bad_rows_stop_the_evaluation(tmp_path: Path, model_dir: Path, data: Path) -> None:
    settings = config(tmp_path, model_dir, data).model_copy(
        update={"data": schema.Data(path=data, max_prompt_tokens=5)}
    )
    with pytest.raises(ValueError, match=r"rows of .* can't be used.*overlong prompt"):
        evaluate.run(settings)
    assert not (settings.run.dir / "eval.json").exists()


def row(source: str = digit_sums.DATA_SOURCE) -> PromptRow:
    return PromptRow(
        row_id="r",
        messages=(Message("user", "<image>\nAdd the two digits."),),
        images=(),
        ground_truth="11",
        data_source=source,
        extra_info={"question_type": "sum", "digits": [3, 8]},
    )


@pytest.fixture(scope="module")
def scorer() -> Iterator[Scorer]:
    scorer = Scorer(schema.Rewards(workers=1))
    yield scorer
    scorer.close()


def scored_by(scorer: Scorer, row: PromptRow, text: str) -> ScoredRow:
    [reward] = scorer.score([reward_item(row, text)])
    return score_response(row, text, tokens=9, finished=True, reward=reward)


@pytest.mark.parametrize(
    ("text", "answer", "format_", "perception", "reasoning"),
    [
        ("<caption>3 8</caption><think>3+8=11</think><answer>11</answer>", True, True, True, True),
        (
            "<caption>3 8</caption><think>3+8=12</think><answer>12</answer>",
            False,
            True,
            True,
            False,
        ),
        (
            "<caption>3 9</caption><think>3+9=12</think><answer>12</answer>",
            False,
            True,
            False,
            True,
        ),
        (
            "<caption>3 9</caption><think>3+9=11</think><answer>11</answer>",
            True,
            True,
            False,
            False,
        ),
        ("<caption>?</caption><think>-</think><answer>11</answer>", True, True, False, None),
        ("3 + 8 = 11", False, False, False, None),
    ],
)
def test_perception_reasoning_and_format_are_marked_apart(
    scorer: Scorer, text: str, answer: bool, format_: bool, perception: bool, reasoning: bool | None
) -> None:
    scored = scored_by(scorer, row(), text)
    assert (scored.answer_correct, scored.format_correct) == (answer, format_)
    assert (scored.perception_correct, scored.reasoning_correct) == (perception, reasoning)
    assert scored.question == "Add the two digits."


def test_other_data_is_not_marked_for_digits(scorer: Scorer) -> None:
    text = "<caption>3 8</caption><think>3+8=11</think><answer>11</answer>"
    scored = scored_by(scorer, row("geometry"), text)
    assert scored.answer_correct
    assert scored.perception_correct is None
    assert scored.reasoning_correct is None
    names = summarise([scored]).keys()
    assert {"answer_accuracy", "format_rate", "response_tokens"} <= names
    assert not {"perception_accuracy", "reasoning_given_perception_accuracy"} & names


def test_means_are_over_the_rows_a_metric_applies_to() -> None:
    def scored(tokens: int, answer: bool, reasoning: bool | None) -> ScoredRow:
        return ScoredRow("r", "q", "t", "x", tokens, True, answer, True, answer, reasoning)

    metrics = summarise([scored(4, True, True), scored(6, False, None), scored(11, False, False)])
    assert metrics["answer_accuracy"] == {"value": pytest.approx(1 / 3), "count": 3}
    assert metrics["reasoning_given_perception_accuracy"] == {"value": 0.5, "count": 2}
    assert metrics["response_tokens"] == {"value": 7.0, "count": 3}
