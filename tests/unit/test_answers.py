"""Answer comparison, corrected and as the reference does it: hand-written pairs and properties."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from prism_megatron.objectives.rewards.pool import ComparisonPool
from prism_megatron.objectives.rewards.worker import compare

FILE = Path(__file__).parents[1] / "fixtures" / "answer_pairs.yaml"
GROUPS: dict[str, list[list[Any]]] = yaml.safe_load(FILE.read_text())
PAIRS = [pair for pairs in GROUPS.values() for pair in pairs]

# (answer, truth, reference, corrected): what the reference was seen to do, right or wrong
SEEN = [
    ("1,234", "1234", False, True),
    ("1234", "1,234", False, True),
    ("(1,2)", "(1, 2)", False, True),
    ("12", "(1,2)", True, False),
    ("5kg", "5lb", True, False),
    ("5 cm", "5 m", True, False),
    ("The answer is a triangle", "A", True, False),
    ("A, because the sides are equal", "A", False, True),
    ("3.14159", "3.1416", False, True),
    ("sqrt(2)", r"\sqrt{2}", False, True),
    ("50%", "50", True, False),
    ("50%", "0.5", True, True),
    (r"\{1, 2\}", r"\{2, 1\}", False, True),
    ("12", "(A) 12", True, True),
    ("0.0000001", "0", False, False),
    ("1000000.5", "1000000", True, True),
    ("1000002", "1000000", False, False),
    ("(1.0000005, 2)", "(1, 2)", True, True),
    ("(2, 1)", "(1, 2)", False, False),
]

# The rule that decides, in both modes
RULES = [
    ("corrected", "", "11", "empty"),
    ("corrected", "11", "11", "exact"),
    ("corrected", "1,100", "1100", "number"),
    ("corrected", "5 cm", "5 m", "unit"),
    ("corrected", "b", "B", "multiple choice"),
    ("corrected", "no", "yes", "yes or no"),
    ("corrected", "(1,2)", "(1, 3)", "parts"),
    ("corrected", "x=1", "y=1", "label"),
    ("corrected", "Blue", "blue", "words"),
    ("corrected", "2x+x", "3x", "expression"),
    ("mm_gad", "11", "11", "exact"),
    ("mm_gad", "11.0", "11", "number"),
    ("mm_gad", "(1, 2)", "(1, 3)", "coordinates"),
    ("mm_gad", "b", "B", "multiple choice"),
    ("mm_gad", "Blue", "blue", "words"),
    ("mm_gad", "x5cm", "X5 cm", "unit"),
    ("mm_gad", "1; 2", "1; 3", "number"),
    ("mm_gad", "1; 2", "1", "parts"),
    ("mm_gad", "12 thousand", "12", "expression"),
    ("geo3k", "1,234", "1234", "mathruler"),
    ("math_verify", "1/2", "0.5", "math-verify"),
]


def test_the_collection_is_large_and_without_repetition() -> None:
    assert len(PAIRS) >= 300
    assert len({(answer, truth) for answer, truth, *_ in PAIRS}) == len(PAIRS)


@pytest.mark.parametrize(("answer", "truth", "verdict"), [pair[:3] for pair in PAIRS])
def test_corrected(answer: str, truth: str, verdict: int) -> None:
    found = compare("corrected", answer, [truth])
    assert found.correct == bool(verdict), found.rule


@pytest.mark.parametrize(
    ("answer", "truth", "verdict"), [(pair[0], pair[1], pair[-1]) for pair in PAIRS if pair[0]]
)
def test_reference(answer: str, truth: str, verdict: int) -> None:
    found = compare("mm_gad", answer.strip(), [truth])
    assert found.correct == bool(verdict), found.rule


@pytest.mark.parametrize(("answer", "truth", "reference", "corrected"), SEEN)
def test_what_the_reference_was_seen_to_do(
    answer: str, truth: str, reference: bool, corrected: bool
) -> None:
    assert compare("mm_gad", answer, [truth]).correct == reference
    assert compare("corrected", answer, [truth]).correct == corrected


@pytest.mark.parametrize(("rules", "answer", "truth", "rule"), RULES)
def test_the_rule_that_decides_is_named(rules: str, answer: str, truth: str, rule: str) -> None:
    assert compare(rules, answer, [truth]).rule == rule


@pytest.mark.parametrize("rules", ["corrected", "math_verify"])
def test_any_of_the_truths_counts(rules: str) -> None:
    assert compare(rules, "12", ["11", "13", "24/2"]).correct
    assert not compare(rules, "12", ["11", "13"]).correct
    assert compare("corrected", "2x", ["3", "x"]).rule == compare("corrected", "2x", ["3"]).rule


@pytest.mark.parametrize(
    ("rules", "answer", "truth", "correct"),
    [
        ("geo3k", "2 \\sqrt { 221 }", "2 \\sqrt{221}", True),
        ("geo3k", "\\frac{1}{2}", "0.5", True),
        ("geo3k", "12 centimeters", "12 meters", True),  # MathRuler drops both units
        ("geo3k", "13", "12", False),
        ("geo3k", "", "12", False),
        ("math_verify", "\\frac{2}{4}", "\\frac{1}{2}", True),
        ("math_verify", "A", "A", True),
        ("math_verify", "B", "A", False),
        ("math_verify", "13", "12", False),
        ("math_verify", "blue", "red", False),
    ],
)
def test_the_other_reward_functions(rules: str, answer: str, truth: str, correct: bool) -> None:
    assert compare(rules, answer, [truth]).correct == correct


# Properties ------------------------------------------------------------------------------------

rationals = st.fractions(min_value=-99, max_value=99, max_denominator=30)
integers = st.integers(-(10**7), 10**7)
BARE = [lambda text: text, lambda text: f" {text} ", lambda text: f"${text}$"]
DRESSED = [
    *BARE,
    lambda text: rf"\({text}\)",
    lambda text: rf"\boxed{{{text}}}",
    lambda text: f"**{text}**",
    lambda text: f"{text}.",
]


def written(value: Fraction) -> st.SearchStrategy[str]:
    """Ways to write an exact number."""
    sign, top, bottom = "-" * (value < 0), abs(value.numerator), value.denominator
    ways = [f"{sign}{top}/{bottom}", rf"{sign}\frac{{{top}}}{{{bottom}}}"]
    ways.append(rf"{sign}\dfrac{{{3 * top}}}{{{3 * bottom}}}")
    if bottom == 1:
        ways += [f"{sign}{top}", f"{sign}{top:,}", f"x = {sign}{top}"]
    if top > bottom > 1:
        ways.append(f"{sign}{top // bottom} {top % bottom}/{bottom}")
    return st.sampled_from(ways)


factors = st.sampled_from([Fraction(1), Fraction(-1), Fraction(2), Fraction(1, 100)])


@given(st.one_of(rationals, integers.map(Fraction)), factors, st.data())
@settings(deadline=None)
def test_exact_numbers_are_equal_exactly_if_their_values_are(
    value: Fraction, factor: Fraction, data: st.DataObject
) -> None:
    answer, truth = data.draw(written(value)), data.draw(written(value * factor))
    expected = value == value * factor
    assert compare("corrected", answer, [truth]).correct == expected
    assert compare("corrected", truth, [answer]).correct == expected


@given(rationals.flatmap(lambda value: st.tuples(written(value), written(value))))
@settings(deadline=None)
def test_spellings_of_one_number_are_equal(spellings: tuple[str, str]) -> None:
    assert compare("corrected", spellings[0], [spellings[1]]).correct


values = st.one_of(
    st.integers(-99, 9999).map(str),
    rationals.map(lambda value: f"{value.numerator}/{value.denominator}"),
    st.sampled_from([r"\sqrt{3}", r"2\pi", "x", "5 cm", "7 kg", "40%", "x^2+1"]),
)
WELL_FORMED = st.one_of(
    values,
    st.lists(values, min_size=2, max_size=4).map(", ".join),
    st.lists(values, min_size=2, max_size=4).map(lambda parts: f"({', '.join(parts)})"),
    st.lists(values, min_size=2, max_size=4).map(lambda parts: f"[{', '.join(parts)})"),
    st.lists(values, min_size=2, max_size=4).map(lambda parts: rf"\{{{', '.join(parts)}\}}"),
    st.sampled_from("ABCDEFGH"),
    st.sampled_from(["yes", "No", "a triangle", "圆形", "New York"]),
)


@given(WELL_FORMED, st.sampled_from(DRESSED), st.sampled_from(BARE))
@settings(deadline=None)
def test_a_well_formed_answer_equals_itself_however_it_is_dressed(
    text: str, dress: Any, dress_truth: Any
) -> None:
    assert compare("corrected", dress(text), [dress_truth(text)]).correct


RELATED = st.sampled_from(
    [
        "5",
        "5 cm",
        "5 kg",
        "5 cm^2",
        "10/2",
        "x = 5",
        "y = 5",
        r"\sqrt{25}",
        "5%",
        "1/20",
        "x+x",
        "2x",
    ]
)
ALIKE = st.one_of(
    RELATED,
    st.lists(RELATED, min_size=2, max_size=2).map(", ".join),
    st.lists(RELATED, min_size=2, max_size=2).map(lambda parts: f"({', '.join(parts)})"),
    st.lists(RELATED, min_size=2, max_size=2).map(lambda parts: rf"\{{{', '.join(parts)}\}}"),
)


@given(ALIKE, ALIKE)
@settings(deadline=None, max_examples=300)
def test_well_formed_answers_compare_alike_in_both_directions(first: str, second: str) -> None:
    there, back = compare("corrected", first, [second]), compare("corrected", second, [first])
    assert there.correct == back.correct


@given(st.lists(st.integers(0, 50).map(str), min_size=2, max_size=5), st.randoms())
@settings(deadline=None)
def test_order_matters_in_tuples_but_not_in_sets(parts: list[str], random: Any) -> None:
    mixed = list(parts)
    random.shuffle(mixed)
    as_set = compare("corrected", f"{{{', '.join(mixed)}}}", [f"{{{', '.join(parts)}}}"])
    as_tuple = compare("corrected", f"({', '.join(mixed)})", [f"({', '.join(parts)})"])
    assert as_set.correct
    assert as_tuple.correct == (mixed == parts)


CHOICES = st.sampled_from(
    "A A. A) (A) B B. B) (B) C. (C) D b (b) red blue Point , ; : / . and or but not is "
    "The answer option because A, B, wrong".split()
)


@given(st.lists(CHOICES, max_size=8).map(" ".join))
@settings(deadline=None)
def test_no_answer_is_right_for_two_options(answer: str) -> None:
    for truths in ("ABCD", ["(A) red", "(B) blue", "(C) not red", "(D) A"]):
        right = [truth for truth in truths if compare("corrected", answer, [truth]).correct]
        assert len(right) <= 1, right


@pytest.fixture(scope="module")
def pool() -> Iterator[ComparisonPool]:
    pool = ComparisonPool(workers=1, timeout=20, memory_gb=2)
    yield pool
    pool.close()


PIECES = st.sampled_from(
    r"( ) [ ] { } \{ \} $ $$ \( \) \[ \] , ; . : = < > + - * / ^ _ % ° ( （ ） ， 1 2 12 0 3.5 "
    r"1,234 A B a x sqrt \sqrt \frac \text{ \left( \right) \boxed{ cm kg 元 or and yes no (1) (2) "
    r"answer is **".split()
)
ANYTHING = st.one_of(
    st.text(max_size=40), st.lists(st.one_of(PIECES, st.just(" ")), max_size=14).map("".join)
)


@given(ANYTHING, ANYTHING, st.sampled_from(["corrected", "mm_gad", "geo3k", "math_verify"]))
@settings(deadline=None, max_examples=150)
def test_nothing_that_is_written_raises(
    pool: ComparisonPool, answer: str, truth: str, rules: str
) -> None:
    [verdict] = pool.compare([(rules, answer, [truth])])
    assert verdict.rule not in ("error", "crash"), verdict
