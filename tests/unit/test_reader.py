"""What the discriminator is shown: the same ends for both sides, or the reference's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoProcessor

from prism_megatron.config import schema
from prism_megatron.data.prompts import PromptEncoder
from prism_megatron.data.rows import RowError
from prism_megatron.objectives.sections import Sections
from prism_megatron.training import discriminator
from prism_megatron.types import Prompt, Sequence
from tests import tiny_models

PROMPT = Prompt("row", (5, 6, 7), ())
SHORT = Sections("3 8", "3+8=11", "11")
LONG = Sections("3 8", "8 3 " * 400, "11")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> PromptEncoder:
    out = tiny_models.save_with_processor(tmp_path_factory.mktemp("tiny"))
    return PromptEncoder(
        AutoProcessor.from_pretrained(out),
        system_prompt=None,
        max_prompt_tokens=400,
        max_response_tokens=4000,
    )


@pytest.mark.parametrize(
    ("warmed", "given", "said"),
    [
        ({"text_only": True}, {"text_only": True, "score_bound": "tanh"}, None),
        ({"text_only": True}, {}, r"text_only=false, but .*text_only=true .*set .*=true, or warm"),
        ({}, {"streams": "response"}, 'streams="response", but .*streams="sections"'),
        # neither upcycled nor released discriminators say what they are shown
        (None, {"streams": "response", "text_only": True}, None),
    ],
)
def test_a_discriminator_goes_on_with_what_it_was_warmed_up_on(
    tmp_path: Path, warmed: dict[str, Any] | None, given: dict[str, Any], said: str | None
) -> None:
    path = tiny_models.save(tmp_path / "moe", "moe")
    before = json.loads((path / "config.json").read_text())
    if warmed is not None:
        section = schema.Discriminator.model_validate({"path": path} | warmed)
        path = discriminator.record_shown(section, tmp_path / "warmed")
        after = json.loads((path / "config.json").read_text())
        assert after.pop("prism_discriminator").keys() == {"streams", "text_only"}
        assert after == before
    section = schema.Discriminator.model_validate({"path": path} | given)
    if said is None:
        discriminator.check_shown(section)
    else:
        with pytest.raises(ValueError, match=said):
            discriminator.check_shown(section)


def read(
    encoder: PromptEncoder, answer: Sections, teacher: bool, **options: Any
) -> dict[str, Sequence]:
    section = schema.Discriminator(path=Path("model"))
    return discriminator.Reader(encoder, section, **options).read(PROMPT, answer, teacher=teacher)


def ids(encoder: PromptEncoder, text: str) -> list[int]:
    return list(PROMPT.input_ids) + list(encoder.encode_section(text))


def test_corrected_both_sides_are_read_alike_and_whole(encoder: PromptEncoder) -> None:
    for answer in (SHORT, LONG):
        sides = [read(encoder, answer, teacher) for teacher in (True, False)]
        for stream, text in (
            ("caption", answer.caption_text),
            ("reasoning", answer.reasoning_text),
        ):
            for side in sides:
                assert side[stream].input_ids.tolist() == [*ids(encoder, text), encoder.end_id]
                assert len(side[stream].response_mask) == len(side[stream])


def test_reference_ends_differ_between_the_sides(encoder: PromptEncoder) -> None:
    teacher = read(encoder, SHORT, True, section_ends="reference")
    student = read(encoder, SHORT, False, section_ends="reference")
    caption, reasoning = ids(encoder, SHORT.caption_text), ids(encoder, SHORT.reasoning_text)
    assert teacher["caption"].input_ids.tolist() == [*caption, encoder.pad_id]
    assert teacher["reasoning"].input_ids.tolist() == [*reasoning, encoder.pad_id]
    assert student["caption"].input_ids.tolist() == caption
    assert student["reasoning"].input_ids.tolist() == [*reasoning, encoder.end_id]
    assert int(student["caption"].response_mask.sum()) == len(caption) - 3


@pytest.mark.parametrize("ends", ["reference", "corrected"])
def test_reference_cuts_the_teacher_alone(encoder: PromptEncoder, ends: str) -> None:
    options = {"teacher_length": "reference", "section_ends": ends}
    whole = ids(encoder, LONG.reasoning_text)
    assert len(whole) > 600
    teacher = read(encoder, LONG, True, **options)["reasoning"]
    # no room is left for the padding token at which a shorter one is read
    last = [encoder.end_id] if ends == "corrected" else []
    assert teacher.input_ids.tolist() == whole[: 3 + 512] + last
    assert int(teacher.response_mask.sum()) == 512 + len(last)
    student = read(encoder, LONG, False, **options)["reasoning"]
    assert student.input_ids.tolist() == [*whole, encoder.end_id]


def test_the_reference_warm_up_ends_with_a_line_end(encoder: PromptEncoder) -> None:
    [line_end] = encoder.encode_section("\n")
    for teacher in (True, False):
        found = read(encoder, SHORT, teacher, line_end=True)
        caption = ids(encoder, SHORT.caption_text)
        assert found["caption"].input_ids.tolist() == [*caption, encoder.end_id, line_end]
        assert int(found["caption"].response_mask.sum()) == len(caption) - 3 + 2


def read_sampled(
    encoder: PromptEncoder, ids: tuple[int, ...], count: int, streams: str = "sections", **ends: Any
) -> dict[str, list[int]]:
    section = schema.Discriminator.model_validate({"path": "model", "streams": streams})
    reader = discriminator.Reader(encoder, section, **ends)
    found = reader.read_sampled(PROMPT, ids, count)
    return {name: each.input_ids.tolist()[3:] for name, each in found.items()}


def test_a_sampled_student_is_bound_by_sampling_alone(encoder: PromptEncoder) -> None:
    short = PromptEncoder(
        encoder.processor, system_prompt=None, max_prompt_tokens=400, max_response_tokens=60
    )
    whole = [*ids(encoder, LONG.reasoning_text), encoder.end_id]
    for teacher, options in ((True, {"sampled_tokens": 9000}), (False, {})):
        with pytest.raises(RowError, match="overlong response"):
            read(short, LONG, teacher, **options)
    for tokens in (len(whole), 9000):
        student = read(short, LONG, False, sampled_tokens=tokens)["reasoning"]
        assert student.input_ids.tolist() == whole
    # what does not fit a micro-batch is cut off, but not the token that is scored
    cut = read(short, LONG, False, sampled_tokens=len(whole) - 2)["reasoning"]
    assert cut.input_ids.tolist() == [*whole[:-3], encoder.end_id]
    assert read_sampled(encoder, (11, 12, 13, 14), 2, "response", sampled_tokens=7) == {
        "response": [11, 12, 13, encoder.end_id]
    }


def test_sampled_tokens_are_shown_as_they_are_but_for_the_end(encoder: PromptEncoder) -> None:
    end, pad = encoder.end_id, encoder.pad_id
    sampled = (11, 12, 13, 14, end)
    found = read_sampled(encoder, sampled, 3, section_ends="reference")
    assert found == {"caption": [11, 12, 13], "reasoning": [14, end]}
    found = read_sampled(encoder, sampled, 3)
    assert found == {"caption": [11, 12, 13, end], "reasoning": [14, end]}
    # cut off, and of a single token
    found = read_sampled(encoder, (11, 12), 1, section_ends="reference")
    assert found == {"caption": [11], "reasoning": [12]}
    found = read_sampled(encoder, (11,), 1, section_ends="reference")
    assert found == {"caption": [11], "reasoning": [pad]}
    assert read_sampled(encoder, (11,), 1) == {"caption": [11, end], "reasoning": [end]}
    assert read_sampled(encoder, sampled, 3, "response") == {"response": [*sampled]}
