from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from prism_megatron.config import schema
from prism_megatron.data import digit_sums


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("digits")
    digit_sums.build(schema.DigitSums(out=out, train_rows=60, heldout_rows=30, seed=5))
    return out


def table(path: Path) -> list[dict]:
    return pq.read_table(path).to_pylist()


def test_training_and_heldout_share_no_scan(tmp_path: Path) -> None:
    digit_sums.build(schema.DigitSums(out=tmp_path, train_rows=2000, heldout_rows=500))
    shown = {
        name: {scan for row in table(tmp_path / f"{name}.parquet") for scan in _scans(row)}
        for name in ("prompts", "heldout")
    }
    assert len(shown["prompts"]) > 1200 and len(shown["heldout"]) > 300
    assert not shown["prompts"] & shown["heldout"]
    heldout = {row["images"][0]["bytes"] for row in table(tmp_path / "heldout.parquet")}
    sft = {path.read_bytes() for path in (tmp_path / "images").iterdir()}
    assert not heldout & sft


def _scans(row: dict) -> list[int]:
    return row["extra_info"]["scans"]


def test_image_shows_the_two_scans_in_order(data: Path) -> None:
    scans = load_digits()
    for row in table(data / "prompts.parquet")[:10]:
        image = Image.open(io.BytesIO(row["images"][0]["bytes"]))
        size = digit_sums.SCAN_PIXELS
        assert image.size == (2 * size, size)
        for side, (scan, digit) in enumerate(
            zip(_scans(row), row["extra_info"]["digits"], strict=True)
        ):
            assert scans.target[scan] == digit
            half = image.crop((side * size, 0, (side + 1) * size, size)).resize((8, 8))
            ink = 255 - np.asarray(half, dtype=float)
            assert np.corrcoef(ink.ravel(), scans.images[scan].ravel())[0, 1] > 0.95


def test_demonstrations_are_right_and_split_into_sections(data: Path) -> None:
    rows = table(data / "prompts.parquet")
    assert {row["extra_info"]["question_type"] for row in rows} == {"sum", "larger"}
    for row in rows:
        first, second = row["extra_info"]["digits"]
        kind = row["extra_info"]["question_type"]
        want = first + second if kind == "sum" else max(first, second)
        assert row["answer"] == row["reward_model"]["ground_truth"] == str(want)
        assert row["teacher_response"] == row["teacher_caption"] + row["teacher_cot"]
        assert row["teacher_caption"].endswith("</caption>")
        assert row["teacher_cot"].endswith(f"<answer>{want}</answer>")
        assert digit_sums.perception_correct(row["extra_info"], row["teacher_response"])
        assert digit_sums.reasoning_given_perception(row["extra_info"], row["teacher_response"])


def test_sft_file_is_sharegpt_with_one_image_a_placeholder(data: Path) -> None:
    rows = json.loads((data / "sft.json").read_text())
    assert len(rows) == 60
    for row in rows:
        user, assistant = row["messages"]
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        assert user["content"].count("<image>") == len(row["images"]) == 1
        assert Image.open(data / row["images"][0]).format == "PNG"


def test_sft_and_prompts_ask_different_questions(data: Path) -> None:
    sft = {(data / row["images"][0]).read_bytes() for row in _sft(data)}
    prompts = {row["images"][0]["bytes"] for row in table(data / "prompts.parquet")}
    assert not sft & prompts


def _sft(data: Path) -> list[dict]:
    return json.loads((data / "sft.json").read_text())


def test_same_seed_same_bytes_other_seed_other_rows(data: Path, tmp_path: Path) -> None:
    for seed, same in ((5, True), (6, False)):
        out = tmp_path / str(seed)
        digit_sums.build(schema.DigitSums(out=out, train_rows=60, heldout_rows=30, seed=seed))
        for name in ("sft.json", "prompts.parquet", "heldout.parquet"):
            assert ((out / name).read_bytes() == (data / name).read_bytes()) == same


def test_no_temporary_file_is_left(data: Path) -> None:
    assert not [path for path in data.rglob("*") if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("text", "digits"),
    [
        ("<caption>3 8</caption><think>3+8=11</think>", (3, 8)),
        ("  <caption> 3  8 </caption>", (3, 8)),
        ("<caption>38</caption>", None),
        ("<caption>3 8 1</caption>", None),
        ("<caption>3 8", None),
        ("3 8", None),
    ],
)
def test_seen_digits(text: str, digits: tuple[int, int] | None) -> None:
    assert digit_sums.seen_digits(text) == digits


def test_perception_and_reasoning_errors_are_told_apart() -> None:
    info = {"question_type": "sum", "digits": [3, 8]}

    def judge(caption: str, answer: int) -> tuple[bool, bool | None]:
        text = f"<caption>{caption}</caption><think>so</think><answer>{answer}</answer>"
        return (
            digit_sums.perception_correct(info, text),
            digit_sums.reasoning_given_perception(info, text),
        )

    assert judge("3 8", 11) == (True, True)
    assert judge("3 8", 12) == (True, False)
    assert judge("3 9", 12) == (False, True)
    assert judge("8 3", 11) == (False, True)
    assert judge("3 9", 11) == (False, False)
    assert judge("nothing", 11) == (False, None)


def test_reasoning_reads_the_final_answer_only() -> None:
    info = {"question_type": "larger", "digits": [3, 8]}
    caption = "<caption>3 8</caption>"
    early = f"{caption}<answer>8</answer><think>no</think><answer>3</answer>"
    assert digit_sums.reasoning_given_perception(info, early) is False
    assert digit_sums.reasoning_given_perception(info, f"{caption}<answer>8</answer> or 3") is False
