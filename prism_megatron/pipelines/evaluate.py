"""Evaluation of an exported model: greedy answers to held-out rows, with plain transformers.

held-out parquet --PromptEncoder--> prompts --generate, greedy--> texts --score--> eval_rows.jsonl
                                                                          `-mean--> eval.json

The model is loaded with from_pretrained and run with generate, as anyone who gets the export
would, so the numbers hold for the export and not only for the trainer's own forward.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.progress import track
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from checkpoint_tools.files import write_atomically
from prism_megatron.config import load, schema
from prism_megatron.data import digit_sums
from prism_megatron.data.prompts import PromptEncoder
from prism_megatron.data.rows import PromptRow, read_prompts
from prism_megatron.data.sources import open_sources
from prism_megatron.data.stream import Quarantine, convert_all
from prism_megatron.objectives.rewards.scorer import Scorer
from prism_megatron.objectives.rewards.types import Reward
from prism_megatron.rollout.collate import collate_prompts
from prism_megatron.rollout.local import load_qwen3_vl
from prism_megatron.rollout.rewards import reward_item
from prism_megatron.types import Prompt


@dataclass(frozen=True)
class Example:
    """A held-out row and its prompt."""

    row: PromptRow
    prompt: Prompt


@dataclass(frozen=True)
class ScoredRow:
    """One answer and what is right about it; None where the question does not apply.

    reasoning_correct: the answer is right for what the caption claims to see, whether or not that
    is what the image shows; None if the caption names nothing that can be reasoned from.
    """

    row_id: str
    question: str
    truth: str
    response: str
    response_tokens: int
    finished: bool
    answer_correct: bool
    format_correct: bool
    perception_correct: bool | None
    reasoning_correct: bool | None


def run(config: schema.Evaluate) -> None:
    """Write eval.json and eval_rows.jsonl into config.run.dir."""
    transformers_logging.disable_progress_bar()
    torch.manual_seed(config.run.seed)
    config.run.dir.mkdir(parents=True, exist_ok=True)
    encoder = PromptEncoder.from_config(config.model, config.data)
    model = load_qwen3_vl(config.model, dtype="auto").to(config.backend).eval()
    examples, quarantined = read_examples(config, encoder)
    answered = list(greedy_responses(model, encoder, examples, config))
    scorer = Scorer(config.rewards)
    rewards = scorer.score(
        [
            reward_item(
                example.row,
                encoder.decode(ids, config.rewards.rules),
                finished=ids[-1] == encoder.end_id,
            )
            for example, ids in answered
        ]
    )
    scorer.close()
    scored = [
        score_response(
            example.row, encoder.decode(ids), len(ids), ids[-1] == encoder.end_id, reward
        )
        for (example, ids), reward in zip(answered, rewards, strict=True)
    ]
    write_results(config, scored, quarantined)


def read_examples(config: schema.Evaluate, encoder: PromptEncoder) -> tuple[list[Example], int]:
    """The usable rows, and how many others went to eval_quarantine.jsonl."""
    path = config.run.dir / "eval_quarantine.jsonl"
    path.unlink(missing_ok=True)
    quarantine = Quarantine(path, config.data.max_bad_share)
    examples = convert_all(
        open_sources(config.data, read_prompts),
        lambda row: Example(row, encoder.encode_prompt(row)),
        quarantine,
    )
    if quarantine.total:
        print(quarantine.summary())
    return examples, quarantine.total


def write_results(config: schema.Evaluate, scored: list[ScoredRow], quarantined: int) -> None:
    """eval.json: metrics and where they come from; eval_rows.jsonl: one ScoredRow a line."""
    lines = [json.dumps(asdict(row)) + "\n" for row in scored]
    write_atomically(config.run.dir / "eval_rows.jsonl", "".join(lines))
    result = {
        "stage": config.stage,
        "model": str(config.model),
        "data": str(config.data.path),
        "rows": len(scored),
        "quarantined": quarantined,
        "seed": config.run.seed,
        **load.provenance(),
        "metrics": summarise(scored),
    }
    write_atomically(config.run.dir / "eval.json", json.dumps(result, indent=2) + "\n")


def greedy_responses(
    model: PreTrainedModel,
    encoder: PromptEncoder,
    examples: list[Example],
    config: schema.Evaluate,
) -> Iterator[tuple[Example, tuple[int, ...]]]:
    """Each example with its response ids, the end-of-turn id included, in order."""
    size = config.batch_size
    batches = [examples[i : i + size] for i in range(0, len(examples), size)]
    for batch in track(batches, description=f"evaluate {config.stage}"):
        inputs = collate_prompts(
            [example.prompt for example in batch],
            pad_id=encoder.pad_id,
            image_token_id=encoder.image_token_id,
            device=model.device,
        )
        output = model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=config.max_new_tokens,
            pad_token_id=encoder.pad_id,
        )
        responses = output[:, inputs["input_ids"].shape[1] :].tolist()
        for example, ids in zip(batch, responses, strict=True):
            yield example, _until_end(tuple(ids), encoder)


def _until_end(ids: tuple[int, ...], encoder: PromptEncoder) -> tuple[int, ...]:
    """The ids up to the first one that ends a response; generate pads what comes after it."""
    for i, token in enumerate(ids):
        if token in (encoder.end_id, encoder.pad_id):
            return ids[: i + 1]
    return ids


def score_response(
    row: PromptRow, text: str, tokens: int, finished: bool, reward: Reward
) -> ScoredRow:
    """Mark one response.

    text is without the end-of-turn token, tokens counts it. What is seen and what is reasoned
    from it are told apart for digit sums alone, whose rows carry the digits.
    """
    perception, reasoning = None, None
    if row.data_source == digit_sums.DATA_SOURCE:
        perception = digit_sums.perception_correct(row.extra_info, text)
        reasoning = digit_sums.reasoning_given_perception(row.extra_info, text)
    return ScoredRow(
        row_id=row.row_id,
        question=row.question.replace("<image>", "").strip(),
        truth=row.ground_truth,
        response=text,
        response_tokens=tokens,
        finished=finished,
        answer_correct=bool(reward.accuracy),
        format_correct=bool(reward.format),
        perception_correct=perception,
        reasoning_correct=reasoning,
    )


def summarise(rows: list[ScoredRow]) -> dict[str, dict[str, Any]]:
    """Metric name -> value (the mean) and count (of the rows it is the mean of).

    A metric that applies to no row is left out. Accuracies lie in [0, 1].
    """
    columns: dict[str, list[Any]] = {
        "answer_accuracy": [row.answer_correct for row in rows],
        "perception_accuracy": [row.perception_correct for row in rows],
        "reasoning_given_perception_accuracy": [row.reasoning_correct for row in rows],
        "format_rate": [row.format_correct for row in rows],
        "finished_rate": [row.finished for row in rows],
        "response_tokens": [row.response_tokens for row in rows],
    }
    known = {
        name: [value for value in values if value is not None] for name, values in columns.items()
    }
    return {
        name: {"value": sum(values) / len(values), "count": len(values)}
        for name, values in known.items()
        if values
    }
