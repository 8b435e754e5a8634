"""Format and answer of responses, corrected and as the reference reads them."""

from __future__ import annotations

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from prism_megatron.objectives.rewards.responses import (
    answer_of,
    has_geo3k_format,
    has_reference_format,
    reference_answer,
)
from prism_megatron.objectives.sections import (
    TAGS,
    Sections,
    reference_sections,
    sections_of,
    split_sections,
)

VALID = "<caption> 3 8 </caption><think> 3 + 8 = 11 </think><answer> 11 </answer>"

# the reference's patterns, as they are documented
LENIENT = re.compile(
    r"^\s*<caption>(.*?)</caption>\s*<think>(.*?)</think>\s*<answer>(.*?)</answer>\s*$", re.DOTALL
)
GEO3K = re.compile(r".*<caption>.*</caption>.*<think>.*</think>.*<answer>.*</answer>.*", re.DOTALL)
FIRST_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)

pieces = st.lists(st.sampled_from([*TAGS, " ", "\n", "x", "\u3000", "<answer"]), max_size=16)
tagged = st.lists(pieces.map("".join), min_size=7, max_size=7).map(
    lambda gaps: "".join(gap + tag for gap, tag in zip(gaps, [*TAGS, ""], strict=True))
)
near_valid = st.lists(st.sampled_from(["", " ", "\n", "x"]), min_size=7, max_size=7).map(
    lambda gaps: "".join(gap + tag for gap, tag in zip(gaps, [*TAGS, ""], strict=True))
)
responses = st.one_of(pieces.map("".join), tagged, near_valid)


@given(responses)
@example(VALID)
@example(VALID + "\n")
@example(VALID + VALID)
@example(VALID + "<answer></answer>")
@example("<caption></caption><think></think><answer></answer>")
@example("<caption></caption><think></think><answer></answer")
def test_the_lenient_format_is_the_references_pattern(text: str) -> None:
    match, found = LENIENT.match(text), reference_sections(text)
    assert has_reference_format(text) == (match is not None)
    assert found == (Sections(*match.groups()) if match else None)


@given(responses)
@example("so: " + VALID + " done")
def test_the_geo3k_format_is_the_references_pattern(text: str) -> None:
    assert has_geo3k_format(text) == bool(GEO3K.search(text))


@given(responses)
@example(VALID.replace("3 + 8", "<answer>12</answer>"))
@example("<answer>never closed")
def test_the_first_answer_is_the_references(text: str) -> None:
    match = FIRST_ANSWER.search(text)
    assert reference_answer(text) == (match.group(1).strip() if match else "")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (VALID, "11"),
        (VALID + " done", None),
        (VALID.replace("3 + 8", "<answer>12</answer>"), None),
        (VALID.replace(" 3 8 ", " "), None),
        (VALID.replace("think", "thought"), None),
        ("11", None),
    ],
)
def test_the_answer_of_a_valid_response(text: str, answer: str | None) -> None:
    assert answer_of(text) == answer


written = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)
body = st.one_of(written, st.lists(written).map("\n".join)).filter(
    lambda text: text.strip() and not any(tag in text for tag in TAGS) and "<|" not in text
)
space = st.text(st.sampled_from(" \n\t\r"), max_size=4)


@given(body, body, body, st.tuples(space, space, space, space))
def test_a_response_built_from_parts_splits_back_into_them(
    caption: str, think: str, answer: str, spaces: tuple[str, str, str, str]
) -> None:
    before, first, second, after = spaces
    text = (
        f"{before}<caption>{caption}</caption>{first}<think>{think}</think>{second}"
        f"<answer>{answer}</answer>{after}"
    )
    sections = split_sections(text)
    assert sections is not None
    assert (sections.caption, sections.think, sections.answer) == (caption, think, answer)
    assert sections_of(sections.caption_text, sections.reasoning_text) == sections
    assert has_reference_format(text) and has_geo3k_format(text)
    assert answer_of(text) == reference_answer(text) == answer.strip()
