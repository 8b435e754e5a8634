"""Answer comparison and the RLVR reward, with the reference's known errors as cases."""

from __future__ import annotations

import threading

import pytest

from prism_megatron.objectives import math_equality
from prism_megatron.objectives.math_equality import MathVerifier
from prism_megatron.objectives.rewards import (
    Reward,
    accuracy,
    extract_answer,
    format_reward,
    response_reward,
)


def response(answer: str, caption: str = " 3 8 ", think: str = " 3 + 8 = 11 ") -> str:
    return f"<caption>{caption}</caption><think>{think}</think><answer>{answer}</answer>"


# (answer, truth): each was judged wrongly by the reference, the other way round.
REFERENCE_REFUSED = [
    ("1,234", "1234"),
    ("1234", "1,234"),
    ("(1,2)", "(1, 2)"),
    ("A, because the sides are equal", "A"),
    ("3.14159", "3.1416"),
    ("sqrt(2)", r"\sqrt{2}"),
    (r"\{2, 1\}", "{1,2}"),
]
REFERENCE_ACCEPTED = [
    ("12", "(1,2)"),
    ("5kg", "5lb"),
    ("5 cm", "5 m"),
    ("The answer is a triangle", "A"),
    ("50%", "50"),
]
EQUAL = [
    ("11", "11"),
    (" 11. ", "11"),
    ("$11$", "11"),
    (r"\(11\)", "11"),
    ("**11**", "11"),
    (r"\boxed{11}", "11"),
    ("\N{MINUS SIGN}5", "-5"),
    ("0.50", "1/2"),
    (r"\frac{1}{2}", "0.5"),
    (r"\dfrac12", "0.5"),
    ("50%", "0.5"),
    (r"50\%", "50 percent"),
    ("3 \N{MULTIPLICATION SIGN} 10^8", "3e8"),
    ("1,234,567.5", "1234567.5"),
    ("5", "5 cm"),
    ("5 centimeters", "5cm"),
    ("12 cm\N{SUPERSCRIPT TWO}", "12 square centimeters"),
    ("60 km/h", "60 kilometers per hour"),
    ("30\N{DEGREE SIGN}", r"30^\circ"),
    ("12 apples", "12"),
    ("x = 5", "5"),
    ("1, 2", "1,2"),
    ("5; 6", "(1) 5 (2) 6"),
    ("x = 1, y = 2", "1, 2"),
    ("2 and 3", "2, 3"),
    ("[1, 2)", "[1,2)"),
    (r"\left(1, \frac{1}{2}\right)", "(1, 0.5)"),
    (r"{\frac{1}{2}, 3}", r"\{3, 0.5\}"),
    ("Yes!", "yes"),
    ("Isosceles  triangle", "isosceles triangle"),
    ("2*pi", r"2\pi"),
    ("x^2 + 2x + 1", "(x+1)^2"),
    (r"\frac{\sqrt{2}}{2}", r"1/\sqrt{2}"),
    (r"5\sqrt{2} cm", r"\sqrt{50}"),
]
UNEQUAL = [
    ("12", "11"),
    ("11", "-11"),
    ("110", "11"),
    ("3.14", "3.14159"),  # fewer decimals than were asked for
    ("0.54", "0.5"),  # 0.5 may be exact
    ("3.2", "3"),
    ("1000001", "1000000"),  # integers are exact, however long
    ("0.00001", "0"),
    ("1, 234", "1234"),  # a list of two
    ("5", "5x"),
    ("12 apples", "12 pears"),
    ("5 cm^2", "5 cm"),
    ("60 km/h", "60 km"),
    ("12 thousand", "12"),
    ("y = 5", "x = 5"),
    ("2, 1", "1, 2"),
    ("(2, 1)", "(1, 2)"),
    ("(1, 2)", "[1, 2]"),
    ("{1, 1}", "{1, 2}"),
    ("{1, 2, 3}", "{1, 2}"),
    ("1, 2, 3", "1, 2"),
    ("(1) 5 (2) 7", "(1) 5 (2) 6"),
    ("no", "yes"),
    ("x^2 + 1", "(x+1)^2"),
    ("", "11"),
    ("   ", ""),
]
HACKS = [
    ("11 or 12", "11"),
    ("10, 11, 12", "11"),
    ("10 11", "110"),
    ("1 11", "11"),  # LaTeX would read a product
    ("11 = 12", "12"),
    (r"11 \approx 12", "11"),
    ("11 \N{ALMOST EQUAL TO} 12", "11"),
    ("11_12", "11"),
    ("12 = 12", "12"),
    ("not 11", "11"),
    ("the answer is 11 or so, maybe 12", "11"),
    ("{10, 11}", "11"),
    ("x", "11"),
    ("11" * 600, "11"),
    ("A, B", "A"),
    ("A or B", "B"),
    ("A. B. C. D.", "A"),
    ("ABCD", "A"),
    ("option A or option C", "A"),
    ("The answer is not A", "A"),
    ("not option A", "A"),
    ("A triangle", "A"),
]
CHOICES = [
    ("A", "A", 1),
    ("(a)", "A", 1),
    ("B.", "B", 1),
    ("The answer is C", "C", 1),
    ("the correct option is (D).", "D", 1),
    ("B: a circle", "B", 1),
    ("B", "(B) 12", 1),
    ("B", "B. (3, 4)", 1),
    ("12", "(B) 12", 1),
    ("(A) 12", "(B) 12", 0),
    ("13", "(B) 12", 0),
    ("C", "A", 0),
    ("I", "A", 0),
    ("C, A", "A, C", 1),
    ("A, B", "A, C", 0),
]


@pytest.mark.parametrize(("answer", "truth"), REFERENCE_REFUSED)
def test_right_answers_that_the_reference_refuses(answer: str, truth: str) -> None:
    assert accuracy(answer, truth) == 1


@pytest.mark.parametrize(("answer", "truth"), REFERENCE_ACCEPTED)
def test_wrong_answers_that_the_reference_accepts(answer: str, truth: str) -> None:
    assert accuracy(answer, truth) == 0


@pytest.mark.parametrize(("answer", "truth"), EQUAL)
def test_equal_in_another_spelling(answer: str, truth: str) -> None:
    assert accuracy(answer, truth) == 1


@pytest.mark.parametrize(("answer", "truth"), UNEQUAL)
def test_unequal(answer: str, truth: str) -> None:
    assert accuracy(answer, truth) == 0


@pytest.mark.parametrize(("answer", "truth"), HACKS)
def test_hedges_and_tricks_earn_nothing(answer: str, truth: str) -> None:
    assert accuracy(answer, truth) == 0


@pytest.mark.parametrize(("answer", "truth", "expected"), CHOICES)
def test_multiple_choice(answer: str, truth: str, expected: int) -> None:
    assert accuracy(answer, truth) == expected


def test_any_equivalent_truth_counts() -> None:
    assert accuracy("twelve", "12", equivalents=("XII", "Twelve")) == 1
    assert accuracy("eleven", "12", equivalents=("XII", "Twelve")) == 0


def test_reward_weighs_accuracy_and_format() -> None:
    assert response_reward(response(" 11 "), "11") == Reward(1.0, 1.0, 1.0)
    assert response_reward(response(" 12 "), "11") == Reward(0.2, 0.0, 1.0)
    right = response_reward(response("11"), "11", accuracy_weight=0.7, format_weight=0.1)
    assert right.total == pytest.approx(0.8)


@pytest.mark.parametrize(
    "text",
    [
        "11",
        "<answer>11</answer>",
        response("11") + " 11",
        response("11", think="<answer>11</answer>"),
        response("12") + response("11"),
        response("11", caption=" "),
        response("11").replace("think", "thought"),
    ],
)
def test_right_answer_in_wrong_format_earns_nothing(text: str) -> None:
    assert response_reward(text, "11") == Reward(0.0, 0.0, 0.0)
    assert format_reward(text) == 0


def test_last_answer_is_extracted_whatever_the_format() -> None:
    assert extract_answer("<think><answer>1</answer></think><answer> 2 </answer>") == "2"
    assert extract_answer("<answer>never closed") is None
    assert extract_answer("2</answer>") is None
    assert extract_answer("<answer>1<answer>2</answer>") == "2"


def test_expressions_compare_off_the_main_thread() -> None:
    verdicts: list[float] = []
    thread = threading.Thread(target=lambda: verdicts.append(accuracy("2x + x", "3x")))
    thread.start()
    thread.join()
    assert verdicts == [1]


def test_endless_computation_is_cut_off_and_the_next_question_answered(
    caplog: pytest.LogCaptureFixture,
) -> None:
    verifier = MathVerifier(timeout=60)
    try:
        assert verifier.equal("x+x", "2x")
        verifier.timeout = 0.5
        assert not verifier.equal("9^{9^{9^{9^{9}}}}", "9^{9^{9^{9}}} + 1")
        verifier.timeout = 60
        assert verifier.equal("y+y", "2y")
    finally:
        verifier.close()
    assert "counted as unequal" in caplog.text


def test_killed_process_is_replaced() -> None:
    verifier = MathVerifier(timeout=60)
    try:
        assert verifier.equal("x+x", "2x")
        assert verifier._process is not None
        verifier._process.kill()
        verifier._process.wait()
        assert verifier.equal("y+y", "2y")
    finally:
        verifier.close()


def test_missing_library_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(math_equality.sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="did not start"):
        MathVerifier().equal("x", "x + 0")
