"""The answer comparison of the reference, with its errors: `rules: reference`.

Source: mm_gad_no_llm.py, the reward of its RLVR stage, written anew from its behaviour. Each part
of an answer goes through

    coordinates -> multiple choice, or exact -> number -> words -> words without unit
        -> math-verify, unless one of the former decided for the answer

What is known to be wrong, and is kept here: "12" equals "(1,2)" since commas between digits are
deleted; "5kg" equals "5lb", since numbers are compared without units; "The answer is a triangle"
chooses A; "1,234" is two values, since answers are split before those commas are deleted.
"""

from __future__ import annotations

import re

from prism_megatron.objectives.rewards import expressions
from prism_megatron.objectives.rewards.types import Verdict

_OPTIONS = "ABCDEFGH"
_RELATIVE_TOLERANCE, _COORDINATE_TOLERANCE = 1e-6, 1e-6
_DELIMITERS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"))


def compare(answer: str, truth: str) -> Verdict:
    """Whether the answer is right by the reference's rules."""
    answers, truths = split_parts(answer), split_parts(truth)
    if len(answers) != len(truths):
        return Verdict(False, "parts")
    for part, true_part in zip(answers, truths, strict=True):
        verdict = _compare_part(_clean(part), _clean(true_part))
        if not verdict.correct:
            return verdict
    return verdict if len(truths) == 1 else Verdict(True, "parts")


def _compare_part(answer: str, truth: str) -> Verdict:
    coordinates = _compare_coordinates(answer, truth)
    if coordinates is not None:
        return coordinates
    verdict = _compare_texts(answer, truth)
    if verdict.correct or len(split_parts(answer)) > 1 or len(split_parts(truth)) > 1:
        return verdict
    equal = expressions.texts_equal(_spellings(answer), _spellings(truth))
    return Verdict(True, "expression") if equal else verdict


# Parts -----------------------------------------------------------------------------------------

_ITEM = re.compile(r"\(\d+\)\s*")
_LATEST_FIRST_ITEM = 2


def split_parts(text: str) -> list[str]:
    """Items "(1) ... (2) ...", else what semicolons, else what commas outside brackets separate.

    Empty parts are dropped; a text that does not come apart is its own only part.
    """
    text = text.strip()
    ways = (_numbered_items(text), re.split("[;\N{FULLWIDTH SEMICOLON}]", text), _at_commas(text))
    for pieces in ways:
        parts = [piece for piece in map(str.strip, pieces) if piece]
        if len(parts) > 1:
            return parts
    return [text]


def _numbered_items(text: str) -> list[str]:
    found = list(_ITEM.finditer(text))
    if len(found) < 2 or found[0].start() > _LATEST_FIRST_ITEM:
        return []
    ends = [match.start() for match in found[1:]] + [len(text)]
    items = [text[match.end() : end].strip() for match, end in zip(found, ends, strict=True)]
    return [item.rstrip(",;\N{FULLWIDTH COMMA}\N{FULLWIDTH SEMICOLON}") for item in items]


def _at_commas(text: str) -> list[str]:
    parts, depth = [""], 0
    for character in text:
        if character == "," and not depth:
            parts.append("")
            continue
        depth = max(0, depth + (character in "([{") - (character in ")]}"))
        parts[-1] += character
    return parts


# Spelling --------------------------------------------------------------------------------------

_LATEX_SPELLINGS = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\[dt]frac", r"\\frac"),
        (r"\\text\s*\{([^}]*)\}", r"\1"),
        (r"\\mathrm\s*\{([^}]*)\}", r"\1"),
        (r"\\left\s*", ""),
        (r"\\right\s*", ""),
        (r"\{\s+", "{"),
        (r"\s+\}", "}"),
        (r"\s+", " "),
    )
)
_COMMA_BETWEEN_DIGITS = re.compile(r"(\d),(\d)")


def _clean(text: str) -> str:
    text = _without_commas(_in_plain_latex(_without_delimiters(text.strip())))
    return text.removesuffix(".").strip()


def _without_delimiters(text: str) -> str:
    text = text.strip()
    for opening, closing in _DELIMITERS:
        long_enough = len(text) > len(opening) + len(closing)
        if long_enough and text.startswith(opening) and text.endswith(closing):
            text = text[len(opening) : -len(closing)].strip()
    return text


def _in_plain_latex(text: str) -> str:
    for pattern, replacement in _LATEX_SPELLINGS:
        text = pattern.sub(replacement, text)
    return text.strip()


def _without_commas(text: str) -> str:
    return _COMMA_BETWEEN_DIGITS.sub(r"\1\2", text).replace("\N{FULLWIDTH COMMA}", "")


def _spellings(text: str) -> list[str]:
    """What math-verify is shown of a text."""
    bare = _without_delimiters(text)
    return list(dict.fromkeys((text, bare, _in_plain_latex(bare))))


# Rules -----------------------------------------------------------------------------------------

_NUMBER = r"([-+]?\d+(?:\.\d+)?)"
_PAIR = re.compile(rf"{_NUMBER}\s*,\s*{_NUMBER}")


def _compare_coordinates(answer: str, truth: str) -> Verdict | None:
    """None if there are no coordinates in one of the two."""
    pairs, wanted = _PAIR.findall(answer), _PAIR.findall(truth)
    if not pairs or not wanted:
        return None
    equal = len(pairs) == len(wanted) and all(
        abs(float(value) - float(other)) <= _COORDINATE_TOLERANCE
        for pair, other_pair in zip(pairs, wanted, strict=True)
        for value, other in zip(pair, other_pair, strict=True)
    )
    return Verdict(equal, "coordinates")


def _compare_texts(answer: str, truth: str) -> Verdict:
    if option := _option_of_truth(truth):
        return Verdict(_option_of_answer(answer) == option, "multiple choice")
    if answer == truth:
        return Verdict(True, "exact")
    number, wanted = _parse_number(answer), _parse_number(truth)
    if number is not None and wanted is not None:
        if wanted == 0:
            return Verdict(number == 0, "number")
        near = abs(number - wanted) / abs(wanted) < _RELATIVE_TOLERANCE
        return Verdict(near, "number")
    if _words(answer) == _words(truth):
        return Verdict(True, "words")
    (body, unit), (other_body, other_unit) = _split_unit(answer), _split_unit(truth)
    same = bool(body and other_body) and _words(body) == _words(other_body)
    return Verdict(same and unit == other_unit, "unit" if same else "words")


_OPTION_BEFORE_TEXT = re.compile(
    rf"\((?P<bracketed>[{_OPTIONS}])\)\s.+"
    rf"|(?P<marked>[{_OPTIONS}])\.\s+[(\[{{0-9+-].*",
    re.DOTALL | re.IGNORECASE,
)
_ONLY_OPTION = re.compile(rf"[(\[{{]?\s*([{_OPTIONS}])\s*[)\]}}]?\s*[.:]?", re.IGNORECASE)
_NAMED_OPTIONS = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        rf"\b(?:answer|option|choice)\s*(?:is|:)\s*[(\[{{]?\s*([{_OPTIONS}])\s*[)\]}}]?"
        r"(?![^\s,;:.!?])",
        rf"(?<![^\s,;:])\(([{_OPTIONS}])\)(?![^\s,;:.!?])",
        rf"(?<![^\s,;:])([{_OPTIONS}])[.)](?![^\s,;:.!?])",
    )
)
"""How an answer may name an option, the most telling way first."""


def _option_of_truth(truth: str) -> str:
    """The letter of a truth that is an option, "" if it is none."""
    if truth in tuple(_OPTIONS):
        return truth
    match = _OPTION_BEFORE_TEXT.fullmatch(truth)
    return (match["bracketed"] or match["marked"]).upper() if match else ""


def _option_of_answer(answer: str) -> str:
    if match := _ONLY_OPTION.fullmatch(answer):
        return match[1].upper()
    found = (pattern.search(answer) for pattern in _NAMED_OPTIONS)
    return next((match[1].upper() for match in found if match), "")


_UNITS = (
    "° °C °F % meter meters cm mm km dm inche inches ft feet cm² cm³ m² m³ "
    "kg mg lb lbs pound pounds ml liter liters litre litres "
    "second seconds sec minute minutes min hour hours hr day days year years "
    "plate plates piece pieces item items person people persons student students time times "
    "元 米 厘米 千克 克 度 个 条 张 块 人 次"
).split()
_UNIT = re.compile(rf"(?<=\d)\s*({'|'.join(map(re.escape, _UNITS))})\s*\Z", re.IGNORECASE)
_BOLD = re.compile(r"\*{1,2}(.+?)\*{1,2}")
_PUNCTUATION = str.maketrans("", "", "，。！？、；：“”‘’（）[]【】{}\",;:!?'().")


def _parse_number(text: str) -> float | None:
    try:
        return float(_split_unit(_without_commas(text))[0])
    except ValueError:
        return None


def _split_unit(text: str) -> tuple[str, str]:
    """The text before the unit at its end, and the unit; only a digit may stand before it."""
    text = text.strip()
    match = _UNIT.search(text)
    if match is None:
        return text, ""
    return text[: match.start()].strip(), match[1].lower()


def _words(text: str) -> str:
    text = _BOLD.sub(r"\1", text.lower().strip())
    return " ".join(text.translate(_PUNCTUATION).split())
