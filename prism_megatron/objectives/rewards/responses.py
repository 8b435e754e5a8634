"""Format and answer of a response, in time linear in its length.

`rules: corrected` takes the sections of sections.py. `rules: reference` takes the reference's two
formats, which let empty and repeated sections pass, and its answer, the first one.
"""

from __future__ import annotations

from prism_megatron.objectives.sections import TAGS, reference_sections, split_sections


def answer_of(response: str) -> str | None:
    """The answer of a response of valid format (`split_sections`), stripped; None if invalid."""
    sections = split_sections(response)
    return sections.answer.strip() if sections is not None else None


def reference_answer(response: str) -> str:
    """Body of the first `<answer>...</answer>`, stripped; "" without one. It may stand inside the
    thinking."""
    _, _, after = response.partition("<answer>")
    body, closing, _ = after.partition("</answer>")
    return body.strip() if closing else ""


def has_reference_format(response: str) -> bool:
    """Whether the reference's rewards accept the format. Source: FORMAT_PATTERN of
    mm_gad_no_llm.py."""
    return reference_sections(response) is not None


def has_geo3k_format(response: str) -> bool:
    """Whether the six tags occur in this order, whatever is around them. Source: geo3k.py."""
    end = 0
    for tag in TAGS:
        start = response.find(tag, end)
        if start < 0:
            return False
        end = start + len(tag)
    return True
