"""`prism-megatron score`, end to end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from prism_megatron import cli, score


def response(answer: str) -> str:
    return f"<caption>c</caption><think>t</think><answer>{answer}</answer>"


def line(number: int, answer: str, truth: str = "1234", **more: Any) -> dict[str, Any]:
    return {
        "id": f"row-{number}",
        "response": response(answer),
        "ground_truth": truth,
        "data_source": "mm_gad",
        **more,
    }


LINES = [
    line(0, "1,234"),
    line(1, "12", "(1,2)"),
    line(2, "1,234") | {"response": "1,234"},
    line(3, "twelve", "12", extra_info={"equivalent_answers": ["Twelve"], "split": "train"}),
    line(4, "圆形", "圆形", prompt="ignored") | {"id": 4},
]


def written(file: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in file.read_text().splitlines()]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    file = tmp_path / "responses.jsonl"
    file.write_text("".join(json.dumps(item) + "\n" for item in LINES))
    return file


def test_each_line_gets_its_reward_in_order(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "scores.jsonl"
    assert cli.main(["score", "--input", str(source), "--output", str(output)]) == 0
    assert written(output) == [
        {"id": "row-0", "score": 1.0, "accuracy": 1.0, "format": 1.0, "rule": "number"},
        {"id": "row-1", "score": 0.2, "accuracy": 0.0, "format": 1.0, "rule": "parts"},
        {"id": "row-2", "score": 0.0, "accuracy": 0.0, "format": 0.0, "rule": "format"},
        {"id": "row-3", "score": 1.0, "accuracy": 1.0, "format": 1.0, "rule": "words"},
        {"id": 4, "score": 1.0, "accuracy": 1.0, "format": 1.0, "rule": "exact"},
    ]
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "5 scored, 3 right, 4 well-formed, 0 lines unusable" in printed.err
    assert sorted(file.name for file in tmp_path.iterdir()) == ["responses.jsonl", "scores.jsonl"]


def test_the_references_rules_on_request(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["score", "--input", str(source), "--rules", "reference"]) == 0
    rewards = [json.loads(text) for text in capsys.readouterr().out.splitlines()]
    assert [reward["score"] for reward in rewards] == [0.2, 1.0, 0.0, 0.2, 1.0]
    assert [reward["rule"] for reward in rewards][:2] == ["parts", "words"]


def test_unusable_lines_are_named_and_counted_and_the_rest_is_scored(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = source.read_text().splitlines()
    bad = [
        "no json",
        "",
        "[1, 2]",
        json.dumps({"id": "x", "response": "y", "data_source": "z"}),
        json.dumps(line(9, "1", truth="1") | {"response": 5}),
        '{"id": "\\ud800", "response": "a", "ground_truth": "b", "data_source": "c"}',
    ]
    source.write_bytes("\n".join([good[0], *bad, good[1], "last"]).encode() + b"\xff\n")
    output = tmp_path / "scores.jsonl"
    assert cli.main(["score", "--input", str(source), "--output", str(output)]) == 1
    assert [reward["id"] for reward in written(output)] == ["row-0", "row-1"]
    *complaints, summary = capsys.readouterr().err.splitlines()
    assert [text.split(": ")[0] for text in complaints] == [
        f"{source}:{n}" for n in (2, 3, 4, 5, 6, 7, 9)
    ]
    assert complaints[3].endswith("ground_truth: Field required")
    assert complaints[4].endswith("response: Input should be a valid string")
    assert summary.endswith("2 scored, 1 right, 2 well-formed, 7 lines unusable")


def test_a_hostile_answer_is_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "responses.jsonl"
    hostile = line(0, "9^{9^{9^{9^{9}}}}", "9^{9^{9^{9}}} + 1")
    file.write_text(json.dumps(hostile) + "\n" + json.dumps(line(1, "2x+x", "3x")) + "\n")
    monkeypatch.setattr(score, "Rewards", lambda rules: score_config(rules))
    assert cli.main(["score", "--input", str(file)]) == 0
    printed = capsys.readouterr()
    rules = [json.loads(text)["rule"] for text in printed.out.splitlines()]
    assert rules == ["timeout", "expression"]
    assert "1 timeout, 0 lines unusable" in printed.err


def score_config(rules: Any) -> Any:
    from prism_megatron.config.schema import Rewards

    return Rewards(rules=rules, timeout=6)


def test_long_files_go_through_in_pieces(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(score, "LINES_AT_ONCE", 7)
    sizes: list[int] = []
    whole = score.Scorer.score

    def counted(self: score.Scorer, items: Any) -> Any:
        sizes.append(len(items))
        return whole(self, items)

    monkeypatch.setattr(score.Scorer, "score", counted)
    file = tmp_path / "responses.jsonl"
    file.write_text("".join(json.dumps(line(n, str(n), "10")) + "\n" for n in range(24)))
    assert cli.main(["score", "--input", str(file)]) == 0
    rewards = [json.loads(text) for text in capsys.readouterr().out.splitlines()]
    assert [reward["id"] for reward in rewards] == [f"row-{n}" for n in range(24)]
    assert [reward["accuracy"] for reward in rewards] == [float(n == 10) for n in range(24)]
    assert sizes == [7, 7, 7, 3]


def test_an_output_that_was_not_finished_does_not_replace_the_old_one(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "scores.jsonl"
    output.write_text("old")

    def broken(self: score.Scorer, items: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(score.Scorer, "score", broken)
    with pytest.raises(KeyboardInterrupt):
        cli.main(["score", "--input", str(source), "--output", str(output)])
    assert output.read_text() == "old"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["responses.jsonl", "scores.jsonl"]


def test_a_missing_file_is_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["score", "--input", "nowhere.jsonl"]) == 2
    assert "nowhere.jsonl does not exist" in capsys.readouterr().err


def test_it_runs_without_torch(source: Path) -> None:
    code = (
        "import sys; from prism_megatron.cli import main; "
        f"status = main(['score', '--input', {str(source)!r}]); "
        "heavy = {'torch', 'transformers', 'megatron', 'sympy'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else status)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert len(ran.stdout.splitlines()) == len(LINES)
