"""The quickstart's data: questions about two handwritten digits shown side by side.

The digits are the real 8 x 8 scans that scikit-learn ships (1,797 of them). A question asks for the
sum of the two digits or for the larger one. A demonstration first says what is seen and then
reasons, so a wrong reading of a digit and a wrong calculation can be told apart.

`build` writes the file formats of the published PRISM data:

    sft.json         sharegpt multimodal: messages with a literal <image>, and image paths
    prompts.parquet  prompt, images (encoded bytes), teacher_*, reward_model, extra_info
    heldout.parquet  the same columns, on scans that no training question shows
    images/          the PNG files of sft.json
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image
from sklearn.datasets import load_digits

from checkpoint_tools.files import write_atomically
from prism_megatron.config import schema
from prism_megatron.data.rows import PROMPT_FIELDS, prompt_writer

DATA_SOURCE = "digit_sums"
SCAN_PIXELS = 32
HELDOUT_SHARE = 0.2

QUESTIONS = {
    "sum": (
        "What is the sum of the two digits?",
        "Add the two digits.",
        "What do both digits add up to?",
    ),
    "larger": (
        "Which of the two digits is larger?",
        "What is the larger digit?",
        "Name the larger of both digits.",
    ),
}

CAPTION = re.compile(r"<caption>\s*(\d)\s+(\d)\s*</caption>")
ANSWER = re.compile(r"<answer>\s*(\d+)\s*</answer>\s*$")

PROMPT_SCHEMA = pa.schema(
    [
        *PROMPT_FIELDS,
        (
            "extra_info",
            pa.struct(
                [
                    ("index", pa.string()),
                    ("question_type", pa.string()),
                    ("digits", pa.list_(pa.int64())),
                    ("scans", pa.list_(pa.int64())),
                ]
            ),
        ),
    ]
)


@dataclass(frozen=True)
class Question:
    """One question: its wording, the two scans (indices into load_digits) and their digits."""

    name: str
    question_type: str
    wording: str
    scans: tuple[int, int]
    digits: tuple[int, int]


def solve(question_type: str, digits: Sequence[int]) -> int:
    """The right answer to a question about `digits`."""
    return sum(digits) if question_type == "sum" else max(digits)


def caption_section(digits: Sequence[int]) -> str:
    """What a demonstration says it sees."""
    return f"<caption>{digits[0]} {digits[1]}</caption>"


def reasoning_section(question_type: str, digits: Sequence[int]) -> str:
    """How a demonstration gets from the digits to the answer, and the answer."""
    first, second = digits
    answer = solve(question_type, digits)
    steps = f"{first}+{second}" if question_type == "sum" else f"max({first},{second})"
    return f"<think>{steps}={answer}</think><answer>{answer}</answer>"


def demonstration(question_type: str, digits: Sequence[int]) -> str:
    """A right response in the response format."""
    return caption_section(digits) + reasoning_section(question_type, digits)


def seen_digits(text: str) -> tuple[int, int] | None:
    """The two digits that a response's first caption names, or None if it names no two digits."""
    match = CAPTION.search(text)
    return (int(match[1]), int(match[2])) if match else None


def perception_correct(extra_info: Mapping[str, Any], text: str) -> bool:
    """Whether the caption names the digits that the image shows, in order."""
    return seen_digits(text) == tuple(extra_info["digits"])


def reasoning_given_perception(extra_info: Mapping[str, Any], text: str) -> bool | None:
    """Whether the final answer is right for the digits that the caption claims.

    A response that misreads an image and calculates rightly from there counts as right here.
    None: the caption names no two digits, so there is nothing to judge the answer by.
    """
    digits = seen_digits(text)
    if digits is None:
        return None
    answer = ANSWER.search(text)
    return answer is not None and int(answer[1]) == solve(extra_info["question_type"], digits)


def build(config: schema.DigitSums) -> None:
    """Write the training and held-out files into `config.out`; the same seed gives the same bytes.

    The training files (sft.json, prompts.parquet) have `train_rows` questions each, drawn apart
    from one another; 20 % of the scans are kept for the held-out file alone.
    """
    scans = load_digits()
    rng = np.random.default_rng(config.seed)
    order = rng.permutation(len(scans.target))
    num_heldout = round(HELDOUT_SHARE * len(order))
    heldout_scans, train_scans = order[:num_heldout], order[num_heldout:]

    (config.out / "images").mkdir(parents=True, exist_ok=True)
    sft = _draw(rng, "sft", config.train_rows, train_scans, scans.target)
    _write_sft(config.out, sft, scans.images)
    for name, pool, count in (
        ("prompts", train_scans, config.train_rows),
        ("heldout", heldout_scans, config.heldout_rows),
    ):
        questions = _draw(rng, name, count, pool, scans.target)
        _write_prompts(config.out / f"{name}.parquet", questions, scans.images)


def _draw(
    rng: np.random.Generator, name: str, count: int, pool: np.ndarray, targets: np.ndarray
) -> list[Question]:
    """`count` questions on pairs of scans of `pool`, both types and all wordings alike."""
    questions = []
    for index in range(count):
        first, second = (int(scan) for scan in rng.choice(pool, size=2, replace=False))
        question_type = list(QUESTIONS)[index % len(QUESTIONS)]
        questions.append(
            Question(
                name=f"{name}-{index:06d}",
                question_type=question_type,
                wording=str(rng.choice(QUESTIONS[question_type])),
                scans=(first, second),
                digits=(int(targets[first]), int(targets[second])),
            )
        )
    return questions


def _png(question: Question, scans: np.ndarray) -> bytes:
    """The question's image: its scans (8 x 8, values 0 to 16) side by side, dark on white."""
    pair = np.concatenate([scans[index] for index in question.scans], axis=1)
    gray = Image.fromarray((255 - pair * (255 / 16)).astype(np.uint8))
    buffer = io.BytesIO()
    gray.resize((2 * SCAN_PIXELS, SCAN_PIXELS), Image.Resampling.BICUBIC).save(buffer, "PNG")
    return buffer.getvalue()


def _write_sft(out: Path, questions: Sequence[Question], scans: np.ndarray) -> None:
    rows = []
    for question in questions:
        image = f"images/{question.name}.png"
        write_atomically(out / image, _png(question, scans))
        response = demonstration(question.question_type, question.digits)
        messages = [
            {"role": "user", "content": f"<image>\n{question.wording}"},
            {"role": "assistant", "content": response},
        ]
        rows.append({"messages": messages, "images": [image]})
    write_atomically(out / "sft.json", json.dumps(rows, indent=1).encode())


def _write_prompts(path: Path, questions: Sequence[Question], scans: np.ndarray) -> None:
    with prompt_writer(path, PROMPT_SCHEMA) as add:
        for question in questions:
            add(_prompt_row(question, _png(question, scans)))


def _prompt_row(question: Question, image: bytes) -> dict[str, Any]:
    answer = str(solve(question.question_type, question.digits))
    return {
        "prompt": [{"role": "user", "content": f"<image>\n{question.wording}"}],
        "images": [{"bytes": image, "path": None}],
        "teacher_response": demonstration(question.question_type, question.digits),
        "teacher_caption": caption_section(question.digits),
        "teacher_cot": reasoning_section(question.question_type, question.digits),
        "data_source": DATA_SOURCE,
        "answer": answer,
        "reward_model": {"ground_truth": answer, "style": "rule"},
        "extra_info": {
            "index": question.name,
            "question_type": question.question_type,
            "digits": list(question.digits),
            "scans": list(question.scans),
        },
    }
