"""Verifiable reward of a response: right format, right answer.

An answer is compared with the truth in this order, and the first rule that applies decides:

    multiple choice -> parts (numbered, lists, tuples, sets) -> units -> numbers -> words
        -> expressions (math-verify)

It follows the rules of the reference (mm_gad_no_llm.py) where they hold. Corrected: thousands
separators and tuples are understood before anything is split at commas; units are compared before
numbers; an option letter has to stand alone, in upper case, and be the only one; a percentage is
its value alone (50% = 0.5, not 50); more decimals than the truth's are no error; sets have no
order; plain-text functions are expressions. Where a rule can't tell an answer from a hedge
("A or B", "12, 13", "1 2 3") the answer is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from fractions import Fraction

from prism_megatron.objectives.math_equality import MathVerifier
from prism_megatron.objectives.sections import split_sections

MAX_ANSWER_CHARACTERS = 1024
_MAX_EXPRESSION_CHARACTERS = 256
_RELATIVE_TOLERANCE = Fraction(1, 10**6)


@dataclass(frozen=True)
class Reward:
    """accuracy and format are 0 or 1, total is their weighted sum."""

    total: float
    accuracy: float
    format: float


def format_reward(text: str) -> float:
    """1 if the response has the valid format (`split_sections`), else 0."""
    return float(split_sections(text) is not None)


def extract_answer(text: str) -> str | None:
    """Body of the last `<answer>...</answer>`, stripped, whatever the format; None without one.

    The reference takes the first, which may stand inside the thinking.
    """
    before, closing, _ = text.rpartition("</answer>")
    _, opening, body = before.rpartition("<answer>")
    return body.strip() if closing and opening else None


def response_reward(
    text: str,
    truth: str,
    equivalents: Collection[str] = (),
    *,
    accuracy_weight: float = 0.8,
    format_weight: float = 0.2,
) -> Reward:
    """accuracy_weight * accuracy + format_weight for a response of valid format, else 0.

    Source: the RLVR reward of the paper (0.8 and 0.2). An answer of 1024 characters or more is
    wrong without being looked at.
    """
    sections = split_sections(text)
    if sections is None:
        return Reward(total=0.0, accuracy=0.0, format=0.0)
    correct = accuracy(sections.answer, truth, equivalents)
    return Reward(total=accuracy_weight * correct + format_weight, accuracy=correct, format=1.0)


def accuracy(answer: str, truth: str, equivalents: Collection[str] = ()) -> float:
    """1 if the answer equals the truth or one of the equivalent truths, else 0.

    Examples: "1,234" = "1234", "5 cm" = "5", "5 cm" != "5 m", "\\\\{2, 1\\\\}" = "{1,2}",
    "50%" = "1/2", "A, because ..." = "(A) a circle", "3.14159" = "3.1416" but not the reverse.
    """
    if len(answer) >= MAX_ANSWER_CHARACTERS:
        return 0.0
    cleaned = _clean(answer)
    if not cleaned:
        return 0.0
    return float(any(_matches(cleaned, _clean(accepted)) for accepted in (truth, *equivalents)))


def _matches(answer: str, truth: str) -> bool:
    if answer == truth:
        return True
    option = _OPTION.fullmatch(truth)
    if option is None:
        return _equal(answer, truth)
    letter = _chosen_option(answer)
    if letter is not None:
        return letter in option.group("only", "bracketed", "marked")
    return option["text"] is not None and _equal(answer, option["text"])


# Spelling --------------------------------------------------------------------------------------

_CHARACTERS = str.maketrans(
    {
        "\N{FULLWIDTH COMMA}": ",",
        "\N{FULLWIDTH SEMICOLON}": ";",
        "\N{FULLWIDTH COLON}": ":",
        "\N{FULLWIDTH LEFT PARENTHESIS}": "(",
        "\N{FULLWIDTH RIGHT PARENTHESIS}": ")",
        "\N{FULLWIDTH PERCENT SIGN}": "%",
        "\N{IDEOGRAPHIC FULL STOP}": ".",
        "\N{MINUS SIGN}": "-",
        "\N{EN DASH}": "-",
        "\N{SUPERSCRIPT TWO}": "^2",
        "\N{SUPERSCRIPT THREE}": "^3",
        "\N{MULTIPLICATION SIGN}": r"\times ",
        "\N{MIDDLE DOT}": r"\cdot ",
        "\N{GREEK SMALL LETTER PI}": r"\pi ",
        "\N{INFINITY}": r"\infty ",
        "\N{DEGREE CELSIUS}": "\N{DEGREE SIGN}C",
    }
)
_SPELLINGS = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\*\*(?=\S)(.+?)(?<=\S)\*\*", r"\1"),  # bold
        (r"\\\$|\$|\\[()\[\]]|\\[!]|\\(?:left|right)(?![A-Za-z])", ""),
        (r"\\boxed\{(.*)\}", r"\1"),
        (r"\\[dt]frac", r"\\frac"),
        (r"\\(?:text|textbf|mathrm|mathbf|operatorname)\{([^{}]*)\}", r"\1"),
        (r"\\[,;: ]|\\q?quad(?![A-Za-z])|~", " "),
        (r"\{,\}", ","),
        (r"\\%", "%"),
        (r"\^\s*\{?\s*\\circ\s*\}?|\\degree", "\N{DEGREE SIGN}"),
        (r"\\([{}])", r"\1"),
        (r"\s+", " "),
    )
)


def _clean(text: str) -> str:
    """One spelling of what is written in several: delimiters, spacing, Unicode signs."""
    text = text.translate(_CHARACTERS)
    for pattern, replacement in _SPELLINGS:
        text = pattern.sub(replacement, text)
    text = text.strip()
    return text[:-1].rstrip() if text.endswith(".") and not text.endswith("..") else text


# Multiple choice -------------------------------------------------------------------------------

_OPTION = re.compile(
    r"[(\[]?(?P<only>[A-H])[)\].:]?"
    r"|(?:\((?P<bracketed>[A-H])\)|(?P<marked>[A-H])[.:)])\s*(?P<text>\S.*)"
)
_LONE_LETTER = re.compile(r"(?<![A-Za-z\\])[A-H](?![A-Za-z'])")
_LETTER_ONLY = re.compile(r"[(\[]?([A-Ha-h])[)\]]?[.:]?")
_LETTER_FIRST = re.compile(r"(?:[(\[]([A-H])[)\]]|([A-H])[.,:;)])")
_LETTER_NAMED = re.compile(
    r"(?i:\b(?:answer|option|choice)\b(?:\s+is)?)\s*:?\s*[(\[]?([A-H])[)\]]?"
    r"(?=\s*(?:[.,;:]|because\b|since\b|$))"
)
_NEGATION = re.compile(r"(?i)\b(?:not|never|neither|nor|except)\b|n't\b")


def _chosen_option(answer: str) -> str | None:
    """The option letter that an answer names, None if it names none or several."""
    if match := _LETTER_ONLY.fullmatch(answer):
        return match[1].upper()
    if len(set(_LONE_LETTER.findall(answer))) != 1:
        return None
    if match := _LETTER_FIRST.match(answer):
        return match[1] or match[2]
    match = _LETTER_NAMED.search(answer)
    return match[1] if match and not _NEGATION.search(answer) else None


# Parts -----------------------------------------------------------------------------------------

_LABEL = re.compile(r"([A-Za-z]\w{0,2})\s*(?:=|\\in(?![A-Za-z]))\s*([^=<>]+)")
_THOUSANDS = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})+(?![\d,])")
_CONJUNCTION = re.compile(r",?\s+(?:and|or)\s+")
_NUMBERED = re.compile(r"\((\d)\)")
_OPENING, _CLOSING = "([{", ")]}"


def _equal(answer: str, truth: str, *, nested: bool = False) -> bool:
    """nested: within brackets, where every comma separates."""
    answer_label, answer = _split_label(answer)
    truth_label, truth = _split_label(truth)
    if answer_label and truth_label and answer_label != truth_label:
        return False
    answer_kind, answers = _split_parts(answer, nested)
    truth_kind, truths = _split_parts(truth, nested)
    if answer_kind != truth_kind or len(answers) != len(truths):
        return False
    nested = nested or truth_kind not in ("", "list")
    if not truth_kind:
        return _leaf_equal(answers[0], truths[0])
    if truth_kind == "{}" or all(_LONE_LETTER.fullmatch(part) for part in truths):
        return _same_members(answers, truths)
    return all(_equal(a, t, nested=nested) for a, t in zip(answers, truths, strict=True))


def _same_members(answers: list[str], truths: list[str]) -> bool:
    rest = list(answers)
    for truth in truths:
        found = next((part for part in rest if _equal(part, truth, nested=True)), None)
        if found is None:
            return False
        rest.remove(found)
    return True


def _split_label(text: str) -> tuple[str, str]:
    match = _LABEL.fullmatch(text)
    return (match[1], match[2].strip()) if match else ("", text)


def _split_parts(text: str, nested: bool) -> tuple[str, list[str]]:
    """Kind and parts: "" one value, "list", or the brackets of a tuple, interval or set."""
    if numbered := _split_numbered(text):
        return "list", numbered
    for separators in (";", ","):
        if len(parts := _split_top_level(text, separators, nested)) > 1:
            return "list", parts
    if not _is_enclosed(text):
        return "", [text]
    inner = text[1:-1].strip()
    parts = _split_top_level(inner, ",", nested=True)
    if len(parts) > 1:
        return text[0] + text[-1], parts
    return _split_parts(inner, nested) if text[0] + text[-1] in ("()", "{}") else ("", [text])


def _split_numbered(text: str) -> list[str]:
    """The items of "(1) ... (2) ...", empty if the text is anything else."""
    before, *pieces = _NUMBERED.split(text)
    items = [piece.strip(" ,;") for piece in pieces[1::2]]
    in_order = pieces[::2] == [str(number + 1) for number in range(len(items))]
    return items if len(items) > 1 and not before.strip() and in_order and all(items) else []


def _split_top_level(text: str, separator: str, nested: bool) -> list[str]:
    """Splits at a separator outside all brackets; commas of thousands don't separate."""
    if separator == ",":
        text = _CONJUNCTION.sub(", ", text)
    groups = () if nested else tuple(match.span() for match in _THOUSANDS.finditer(text))
    parts, depth, start = [], 0, 0
    for index, character in enumerate(text):
        depth += (character in _OPENING) - (character in _CLOSING)
        if character == separator and depth == 0:
            if separator == "," and any(low <= index < high for low, high in groups):
                continue
            parts.append(text[start:index].strip())
            start = index + 1
    return [*parts, text[start:].strip()]


def _is_enclosed(text: str) -> bool:
    """Whether the first character opens a bracket that the last one closes."""
    if len(text) < 3 or text[0] not in _OPENING or text[-1] not in _CLOSING:
        return False
    depth = 0
    for index, character in enumerate(text):
        depth += (character in _OPENING) - (character in _CLOSING)
        if depth == 0:
            return index == len(text) - 1
    return False


# Single values ---------------------------------------------------------------------------------

_UNIT_NAMES = {
    "mm": "millimeter millimeters millimetre millimetres",
    "cm": "centimeter centimeters centimetre centimetres",
    "dm": "decimeter decimeters decimetre decimetres",
    "m": "meter meters metre metres",
    "km": "kilometer kilometers kilometre kilometres",
    "in": "inch inches",
    "ft": "foot feet",
    "yd": "yard yards",
    "mi": "mile miles",
    "mg": "milligram milligrams",
    "g": "gram grams",
    "kg": "kilogram kilograms",
    "lb": "lbs pound pounds",
    "oz": "ounce ounces",
    "t": "ton tons tonne tonnes",
    "ms": "millisecond milliseconds",
    "s": "sec secs second seconds",
    "min": "mins minute minutes",
    "h": "hr hrs hour hours",
    "day": "days",
    "week": "weeks",
    "month": "months",
    "year": "years yr yrs",
    "ml": "mL milliliter milliliters millilitre millilitres",
    "L": "l liter liters litre litres",
    "\N{DEGREE SIGN}": "degree degrees deg",
    "\N{DEGREE SIGN}C": "celsius",
    "\N{DEGREE SIGN}F": "fahrenheit",
    "rad": "radian radians",
    "K": "kelvin kelvins",
    "N": "newton newtons",
    "J": "joule joules",
    "kJ": "kilojoule kilojoules",
    "W": "watt watts",
    "kW": "kilowatt kilowatts",
    "V": "volt volts",
    "A": "amp amps ampere amperes",
    "Pa": "pascal pascals",
    "kPa": "kilopascal kilopascals",
    "Hz": "hertz",
    "mol": "mole moles",
    "dollar": "dollars usd USD",
    "cent": "cents",
    "euro": "euros",
}
_UNITS = {name: unit for unit, names in _UNIT_NAMES.items() for name in (unit, *names.split())}
_UNIT = "|".join(sorted(map(re.escape, _UNITS), key=len, reverse=True))
_POWER = r"\s*\^\s*\{?\s*([23])\s*\}?"
_WITH_UNIT = re.compile(
    rf"(?P<body>.*[\d)}}])\s*(?:(?P<square>square|sq\.?)\s+|(?P<cubic>cubic)\s+)?"
    rf"(?P<unit>{_UNIT})(?:{_POWER})?(?:\s*(?:/|per)\s*(?P<per>{_UNIT})(?:{_POWER})?)?"
)
_COUNTED = re.compile(r"(?P<body>[-+]?[\d.,]*\d)\s+(?P<unit>[A-Za-z]{3,})")
_NOT_COUNTED = re.compile(
    r"(?i)hundred|thousand|million|billion|trillion|dozen|percent|squared|cubed|factorial"
)
_DECIMAL = r"(?:\d+|[1-9]\d{0,2}(?:,\d{3})+)(?:\.\d*)?|\.\d+"
_NUMBER = re.compile(
    rf"(?P<sign>[-+]?)\s*(?:(?P<decimal>{_DECIMAL})"
    r"(?:e(?P<e>[-+]?\d{1,2})|\s*\\times\s*10\s*\^\s*\{?\s*(?P<ten>[-+]?\d{1,2})\s*\}?)?"
    r"|(?P<top>\d+)\s*/\s*(?P<bottom>\d+)"
    r"|\\frac\s*\{\s*(?P<numerator>\d+)\s*\}\s*\{\s*(?P<denominator>\d+)\s*\})"
    r"\s*(?P<percent>%|percent)?"
)
_WORD = re.compile(r"[A-Za-z]{2}")
_PUNCTUATION = re.compile(r"(?<!\d)[.,!?'\"]|[.,!?'\"](?!\d)")
_FUNCTION = re.compile(r"(?:arc)?(?:sin|cos|tan)|(?:sin|cos|tan)h|cot|sec|csc|log|exp|sqrt")
_LATEX_COMMAND = re.compile(r"\\[A-Za-z]+")
# What math-verify drops with all that follows, and a row of numbers, which LaTeX multiplies.
_HEDGE = re.compile(
    r"\\(?:approx|sim|simeq|cong)(?![A-Za-z])|[\N{ALMOST EQUAL TO}~]|\d\s*[_']|\d\s+[\d.]"
)
_LETTERS = re.compile(r"[A-Za-z]+")
_PLAIN_PI = re.compile(r"(?<![\\A-Za-z])pi(?![A-Za-z])")
_ROOT_SIGN = re.compile(r"\N{SQUARE ROOT}\s*\(?(\w+)\)?")

_math_verifier = MathVerifier()


@dataclass(frozen=True)
class _Number:
    """decimals, digits: places after the point and significant figures as written."""

    value: Fraction
    exact: bool
    decimals: int = 0
    digits: int = 0


def _leaf_equal(answer: str, truth: str) -> bool:
    answer, answer_unit = _split_unit(answer)
    truth, truth_unit = _split_unit(truth)
    # A unit that one side leaves out is the question's.
    if answer_unit and truth_unit and answer_unit != truth_unit:
        return False
    if answer == truth:
        return True
    answer_number, truth_number = _parse_number(answer), _parse_number(truth)
    if answer_number is not None and truth_number is not None:
        return _numbers_equal(answer_number, truth_number)
    if _WORD.search(truth) and _words(answer) == _words(truth):
        return True
    return _expressions_equal(answer, truth)


def _split_unit(text: str) -> tuple[str, str]:
    """The text before its unit, and the unit in one spelling ("cm^2", "m/s"); "" if none."""
    match = _WITH_UNIT.fullmatch(text)
    if match is None:
        counted = _COUNTED.fullmatch(text)
        if counted is None or _NOT_COUNTED.fullmatch(counted["unit"]):
            return text, ""
        return counted["body"], counted["unit"].lower().removesuffix("s")
    power = "2" if match["square"] else "3" if match["cubic"] else match[5]
    unit = _UNITS[match["unit"]] + (f"^{power}" if power else "")
    if match["per"]:
        unit += "/" + _UNITS[match["per"]] + (f"^{match[7]}" if match[7] else "")
    return match["body"], unit


def _parse_number(text: str) -> _Number | None:
    match = _NUMBER.fullmatch(text)
    if match is None:
        return None
    scale = Fraction(-1 if match["sign"] == "-" else 1, 100 if match["percent"] else 1)
    if match["decimal"] is None:
        numerator = int(match["top"] or match["numerator"])
        denominator = int(match["bottom"] or match["denominator"])
        return _Number(scale * Fraction(numerator, denominator), True) if denominator else None
    digits = match["decimal"].replace(",", "")
    exponent = int(match["e"] or match["ten"] or 0)
    value = scale * Fraction(digits) * Fraction(10) ** exponent
    if match["percent"] or exponent:
        return _Number(value, False)
    places = len(digits.partition(".")[2])
    significant = len(digits.replace(".", "").lstrip("0"))
    return _Number(value, places == 0, places, significant)


def _numbers_equal(answer: _Number, truth: _Number) -> bool:
    """Equal, or as close as the truth was written: more decimals of it are not an error.

    Needs three significant figures of the truth, lest 0.54 pass for 0.5.
    """
    difference = abs(answer.value - truth.value)
    if difference == 0 or (answer.exact and truth.exact):
        return difference == 0
    if difference <= _RELATIVE_TOLERANCE * abs(truth.value):
        return True
    rounded = truth.decimals > 0 and truth.digits >= 3 and answer.decimals > truth.decimals
    return rounded and difference <= Fraction(1, 2 * 10**truth.decimals)


def _words(text: str) -> str:
    return " ".join(_PUNCTUATION.sub(" ", text).casefold().split())


def _expressions_equal(answer: str, truth: str) -> bool:
    if not (_is_expression(answer) and _is_expression(truth)):
        return False
    if any(answer.count(relation) != truth.count(relation) for relation in "=<>"):
        return False
    return _math_verifier.equal(_to_latex(answer), _to_latex(truth))


def _is_expression(text: str) -> bool:
    """Whether the text is one formula: no prose, no second value."""
    words = _LETTERS.findall(_LATEX_COMMAND.sub(" ", text))
    return (
        len(text) <= _MAX_EXPRESSION_CHARACTERS
        and all(len(word) < 3 or _FUNCTION.fullmatch(word) for word in words)
        and text.count("=") <= 1
        and _HEDGE.search(text) is None
    )


def _to_latex(text: str) -> str:
    text = _ROOT_SIGN.sub(r"\\sqrt{\1}", text.replace("**", "^"))
    return _PLAIN_PI.sub(r"\\pi ", text).replace("%", r"\%")
