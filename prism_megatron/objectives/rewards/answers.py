"""The answer comparison of `rules: corrected`.

An answer is compared with the truth in this order, and the first rule that applies decides:

    multiple choice -> yes or no -> parts (numbered, lists, tuples, sets) -> units -> numbers
        -> words -> expressions (math-verify)

It follows the rules of the reference (reference.py) where they hold. Corrected: thousands
separators and tuples are understood before anything is split at commas; units are compared before
numbers; an option letter has to stand alone, in upper case, and be the only choice; a percentage
is its value alone (50% = 0.5, not 50); more decimals than the truth's are no error; sets have no
order; plain-text functions are expressions. Where a rule can't tell an answer from a hedge
("A or B", "12, 13", "1 2 3") the answer is wrong.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from prism_megatron.objectives.rewards import expressions
from prism_megatron.objectives.rewards.types import Verdict

_MAX_EXPRESSION_CHARACTERS = 256
_RELATIVE_TOLERANCE = Fraction(1, 10**6)


def compare(answer: str, truth: str) -> Verdict:
    """Whether the answer is right.

    Examples: "1,234" = "1234", "5 cm" = "5", "5 cm" != "5 m", "\\\\{2, 1\\\\}" = "{1,2}",
    "50%" = "1/2", "A, because ..." = "(A) a circle", "3.14159" = "3.1416" but not the reverse.
    """
    answer, truth = _clean(answer), _clean(truth)
    if not answer:
        return Verdict(False, "empty")
    if answer == truth:
        return Verdict(True, "exact")
    try:
        return _compare_choices(answer, truth) or _compare(answer, truth)
    except RecursionError:
        return Verdict(False, "nested too deeply")


# Spelling --------------------------------------------------------------------------------------

_CHARACTERS = str.maketrans(
    {
        "\N{FULLWIDTH COMMA}": ",",
        "\N{FULLWIDTH SEMICOLON}": ";",
        "\N{FULLWIDTH COLON}": ":",
        "\N{FULLWIDTH LEFT PARENTHESIS}": "(",
        "\N{FULLWIDTH RIGHT PARENTHESIS}": ")",
        "\N{FULLWIDTH PERCENT SIGN}": "%",
        "\N{FULLWIDTH DOLLAR SIGN}": r"\$",
        "\N{FULLWIDTH YEN SIGN}": "\N{YEN SIGN}",
        "\N{FULLWIDTH EQUALS SIGN}": "=",
        "\N{IDEOGRAPHIC COMMA}": ",",
        "\N{IDEOGRAPHIC FULL STOP}": ".",
        "\N{LEFT SINGLE QUOTATION MARK}": "'",
        "\N{RIGHT SINGLE QUOTATION MARK}": "'",
        "\N{LEFT DOUBLE QUOTATION MARK}": '"',
        "\N{RIGHT DOUBLE QUOTATION MARK}": '"',
        "\N{MINUS SIGN}": "-",
        "\N{EN DASH}": "-",
        "\N{SUPERSCRIPT TWO}": "^2",
        "\N{SUPERSCRIPT THREE}": "^3",
        "\N{MULTIPLICATION SIGN}": r"\times ",
        "\N{MIDDLE DOT}": r"\cdot ",
        "\N{DIVISION SIGN}": "/",
        "\N{GREEK SMALL LETTER PI}": r"\pi ",
        "\N{INFINITY}": r"\infty ",
        "\N{LESS-THAN OR EQUAL TO}": r"\le ",
        "\N{GREATER-THAN OR EQUAL TO}": r"\ge ",
        "\N{UNION}": r"\cup ",
        "\N{DEGREE CELSIUS}": "\N{DEGREE SIGN}C",
        "\N{DEGREE FAHRENHEIT}": "\N{DEGREE SIGN}F",
        "\N{VULGAR FRACTION ONE HALF}": " 1/2",
        "\N{VULGAR FRACTION ONE QUARTER}": " 1/4",
        "\N{VULGAR FRACTION THREE QUARTERS}": " 3/4",
    }
)
_SPELLINGS = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\*\*(?=\S)(.+?)(?<=\S)\*\*", r"\1"),  # bold
        (r"(?<!\\)\${1,2}((?:\\.|[^$\\])+)\${1,2}", r"\1"),  # mathematics between dollars
        (r"\\?\$(?!\s*[\d.])", ""),
        (r"\\\$", "$"),
        (r"\\[()\[\]]|\\!|\\(?:left|right|displaystyle)(?![A-Za-z])", ""),
        (r"\\boxed\{(.*)\}", r"\1"),
        (r"\\[dt]frac", r"\\frac"),
        (r"\\(?:text|textbf|mathrm|mathbf|operatorname)\{([^{}]*)\}", r"\1"),
        (r"(?<=\d)(?:\\,|\{,\})(?=\d{3}(?!\d))", ","),
        (r"\\[,;: ]|\\q?quad(?![A-Za-z])|~", " "),
        (r"\{,\}", ","),
        (r"\\%", "%"),
        (r"\^\s*\{?\s*\\circ\s*\}?|\\degree", "\N{DEGREE SIGN}"),
        (r"\\([{}])", r"\1"),
        (r"\s+", " "),
    )
)
_TIGHT = re.compile(r"\s*([^\w\s\\])\s*")


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
_LONE = r"(?<![A-Za-z\\])[A-H](?![A-Za-z'])"
_LONE_LETTER = re.compile(_LONE)
_LETTER_ONLY = re.compile(r"[(\[]?([A-Ha-h])[)\]]?[.:]?")
_LETTER_FIRST = re.compile(r"[(\[]([A-H])[)\]]|([A-H])[.,:;)]")
_LETTER_NAMED = re.compile(
    r"(?i:\b(?:answer|option|choice)\b)\s*(?:(?:(?i:is)\b\s*:?|:)\s*[(\[]?([A-H])[)\]]"
    r"|(?:(?i:is)\b)?\s*:?\s*[(\[]?([A-H])[)\]]?(?=\s*(?:[.,;:]|because\b|since\b|$)))"
)
# What makes a letter after the chosen one a second choice, not a word of the option's text. That
# text may well have letters ("B. A red car", "B. Point A"), so a word that turns away counts too.
_SECOND_CHOICE = re.compile(
    rf"(?<!\w\(){_LONE}\s?(?:[.:](?!M\b)|[)\]])"  # C. or (C), but not 9 A.M. or P(C)
    rf"|(?:[,;/&|和与或]|\band\b)\s*{_LONE}"
    rf"|(?:^|[.?!])[\W_]*(?:{_LONE}[\W_]*)+$"  # nothing but letters: "A. C"
    rf"|^\s*[,;].*{_LONE}"  # not the mark of an option: "A, I mean C"
    r"|^[)\]]?\s*(?:[,;/&|]|and\b|or\b)(?:\W*\b[a-h]\b)+\W*$"  # "A, c"
    r"|(?:(?i:\b(?:or|nor|either|but|so|then|no|not|cannot|wrong|incorrect|maybe|perhaps|possibly"
    r"|probably|likely|could|might|also|alternatively|actually|rather|instead|wait|choose|pick"
    r"|select|answer|option|choice)\b|n't\b)"
    rf"|或|还是).*{_LONE}"
)
_NEGATION = re.compile(r"(?i)\b(?:not|never|neither|nor|except)\b|n't\b")
_ASSENTS = ("yes", "no", "true", "false")
_ASSENT = re.compile(
    r"(?i)(?P<positive>\b(?:yes|true)\b)|(?P<negative>\b(?:no|not|never|false)\b|n't\b)"
)


def _compare_choices(answer: str, truth: str) -> Verdict | None:
    """By the option or the yes or no that the answer chooses; None if that does not tell."""
    if truth.casefold() in _ASSENTS:
        return Verdict(_assents_only(answer, truth.casefold()), "yes or no")
    option = _OPTION.fullmatch(truth)
    if option is None:
        return None
    letter, true_letter = _chosen_option(answer), _option_letter(option)
    if letter is not None or option["text"] is None:
        return Verdict(letter == true_letter, "multiple choice")
    # the same option, but with other letters in its text: "B. A and C are equal"
    same = _OPTION.fullmatch(answer)
    if same and same["text"] and _option_letter(same) == true_letter:
        answer = same["text"]
    return _compare(answer, option["text"])


def _assents_only(answer: str, truth: str) -> bool:
    """Whether the answer begins with the truth and says nothing of the contrary."""
    first = _ASSENT.match(answer)
    said = {match.lastgroup for match in _ASSENT.finditer(answer)}
    return first is not None and first[0].casefold() == truth and len(said) == 1


def _option_letter(option: re.Match[str]) -> str:
    return option["only"] or option["bracketed"] or option["marked"]


def _chosen_option(answer: str) -> str | None:
    """The option letter that an answer names, None if it names none or several."""
    if match := _LETTER_ONLY.fullmatch(answer):
        return match[1].upper()
    match = _LETTER_FIRST.match(answer)
    if match is None and not _NEGATION.search(answer):
        match = _LETTER_NAMED.search(answer)
    if match is None:
        return None
    letter = match[1] or match[2]
    # the choice may be repeated
    before, after = (
        _LONE_LETTER.sub(lambda found: found[0].replace(letter, ""), text)
        for text in (answer[: match.start()], answer[match.end(match.lastindex or 0) :])
    )
    several = _LONE_LETTER.search(before) or _SECOND_CHOICE.search(after)
    return None if several else letter


# Parts -----------------------------------------------------------------------------------------

_LABEL = re.compile(r"([A-Za-z]\w{0,2})\s*(?:=|\\in(?![A-Za-z]))\s*([^=<>]+)")
_THOUSANDS = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})+(?![\d,])")
_CONJUNCTION = re.compile(r",?\s+(?:and|or)\s+")
_NUMBERED = re.compile(r"\((\d)\)")
_OPENING, _CLOSING = "([{", ")]}"


def _compare(answer: str, truth: str, *, nested: bool = False) -> Verdict:
    """nested: within brackets, where every comma separates."""
    answer_label, answer = _split_label(answer)
    truth_label, truth = _split_label(truth)
    if answer_label and truth_label and answer_label != truth_label:
        return Verdict(False, "label")
    answer_kind, answers = _split_parts(answer, nested)
    truth_kind, truths = _split_parts(truth, nested)
    if answer_kind != truth_kind or len(answers) != len(truths):
        return Verdict(False, "parts")
    if not truth_kind:
        return _compare_single(answers[0], truths[0])
    nested = nested or truth_kind != "list"
    if truth_kind == "{}" or all(_LONE_LETTER.fullmatch(part) for part in truths):
        return Verdict(_same_members(answers, truths), "parts")
    pairs = zip(answers, truths, strict=True)
    return Verdict(all(_compare(a, t, nested=nested).correct for a, t in pairs), "parts")


def _same_members(answers: list[str], truths: list[str]) -> bool:
    rest = list(answers)
    for truth in truths:
        found = next((part for part in rest if _compare(part, truth, nested=True).correct), None)
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
    "mm": "毫米 millimeter millimeters millimetre millimetres",
    "cm": "厘米 centimeter centimeters centimetre centimetres",
    "dm": "分米 decimeter decimeters decimetre decimetres",
    "m": "米 meter meters metre metres",
    "km": "千米 公里 kilometer kilometers kilometre kilometres",
    "in": "inch inches",
    "ft": "foot feet",
    "yd": "yard yards",
    "mi": "mile miles",
    "mg": "毫克 milligram milligrams",
    "g": "克 gram grams",
    "kg": "千克 公斤 kilogram kilograms",
    "lb": "lbs pound pounds",
    "oz": "ounce ounces",
    "t": "吨 ton tons tonne tonnes",
    "ms": "millisecond milliseconds",
    "s": "秒 sec secs second seconds",
    "min": "分钟 mins minute minutes",
    "h": "小时 hr hrs hour hours",
    "day": "天 日 days",
    "week": "周 weeks",
    "month": "月 months",
    "year": "年 years yr yrs",
    "ml": "毫升 mL milliliter milliliters millilitre millilitres",
    "L": "升 l liter liters litre litres",
    "\N{DEGREE SIGN}": "度 degree degrees deg",
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
    "dollar": "美元 dollars usd USD",
    "cent": "cents",
    "euro": "euros EUR 欧元",
    "yuan": "元 RMB CNY",
    "sterling": "GBP",
    "rupee": "rupees",
    "mi/h": "mph MPH",
    "km/h": "kph kmh kmph",
    "unit": "单位 units",
    "个": "",
    "条": "",
    "块": "",
    "张": "",
    "人": "",
    "次": "",
}
_UNITS = {name: unit for unit, names in _UNIT_NAMES.items() for name in (unit, *names.split())}
# cm2 and m/s2: powers whose raising was lost
_RAISED = ("mm", "cm", "dm", "m", "km", "in", "ft", "yd", "mi", "unit", "s")
_UNITS |= {
    f"{name}{power}": f"{unit}^{power}"
    for name, unit in _UNITS.items()
    if unit in _RAISED
    for power in "23"
}
_UNIT = "|".join(sorted(map(re.escape, _UNITS), key=len, reverse=True))


def _factor(name: str) -> str:
    """Pattern of a unit and its power: "square cm", "cm^2", "cm squared"."""
    return (
        rf"(?:(?P<{name}_square>square|sq\.?|平方)\s*|(?P<{name}_cubic>cubic|cu\b\.?|立方)\s*)?"
        rf"(?P<{name}>{_UNIT})"
        rf"(?:\s*\^\s*\{{?\s*(?P<{name}_power>[23])\s*\}}?"
        rf"|\s+(?:(?P<{name}_squared>squared)|(?P<{name}_cubed>cubed)))?"
    )


_WITH_UNIT = re.compile(
    rf"(?P<body>.*(?:[\d)}}]|\\pi))\s*{_factor('unit')}(?:\s*(?:/|per)\s*{_factor('per')})?"
)
_CURRENCIES = {"$": "dollar", "€": "euro", "£": "sterling", "¥": "yuan", "₹": "rupee"}
_WITH_CURRENCY = re.compile(
    rf"(?P<sign>-?)\s*(?P<currency>[{''.join(_CURRENCIES)}])\s*(?P<body>.+)"
)
_COUNTED = re.compile(
    r"(?P<body>[-+]?(?:(?:\d+\s+)?\d+\s*/\s*\d+|\d*\s*\\frac\s*\{\s*\d+\s*\}\s*\{\s*\d+\s*\}"
    r"|[\d.,]*\d))\s+(?P<unit>[A-Za-z]{3,})"
)
# Words that change the value before them
_NOT_COUNTED = re.compile(
    r"(?i)(?:tens?|hundred|thousand|[a-z]*illion|dozen|lakh|crore)s?|thou|grand|mil"
    r"|percent(?:s|ages?)?|pct|squared|cubed|doubled|tripled|halved|factorials?"
    r"|alpha|beta|gamma|delta|theta|lambda|sigma|omega|phi"
    r"|hal(?:f|ves)|(?:third|quarter)s?"
    r"|(?:four|fif|six|seven|eigh|nin|ten|eleven|twelf|[a-z]+teen|[a-z]+tie"
    r"|hundred|thousand|[a-z]*illion)ths?"
)
_DECIMAL = r"(?:\d+|[1-9]\d{0,2}(?:,\d{3})+)(?:\.\d*)?|\.\d+"
_NUMBER = re.compile(
    rf"(?P<sign>[-+]?)\s*(?:(?P<decimal>{_DECIMAL})"
    r"(?:e(?P<e>[-+]?\d{1,2})|\s*\\times\s*10\s*\^\s*\{?\s*(?P<ten>[-+]?\d{1,2})\s*\}?)?"
    r"|(?:(?P<whole>\d+)\s+)?(?P<top>\d+)\s*/\s*(?P<bottom>\d+)"
    r"|(?P<whole_before>\d+)?\s*"
    r"\\frac\s*\{\s*(?P<numerator>\d+)\s*\}\s*\{\s*(?P<denominator>\d+)\s*\})"
    r"\s*(?P<percent>%|percent)?"
)
_WORD = re.compile(r"[^\W\d_]{2}")
_PUNCTUATION = re.compile(r"(?<!\d)[.,!?'\"]|[.,!?'\"](?!\d)")
_FUNCTION = re.compile(r"(?:arc)?(?:sin|cos|tan)|(?:sin|cos|tan)h|cot|sec|csc|log|exp|sqrt")
_PLAIN_FUNCTION = re.compile(rf"(?<![\\A-Za-z])(?!sqrt)({_FUNCTION.pattern})(?![A-Za-z])")
_LATEX_COMMAND = re.compile(r"\\[A-Za-z]+")
# What math-verify drops with all that follows, and a row of numbers, which LaTeX multiplies.
_HEDGE = re.compile(
    r"\\(?:approx|sim|simeq|cong)(?![A-Za-z])|[\N{ALMOST EQUAL TO}~]"
    r"|\d\s*[_']|(?<![_\d])\d+\s+[\d.]"
)
_LETTERS = re.compile(r"[^\W\d_]+")
_IDEOGRAPH = re.compile("[\u3040-\u9fff\uac00-\ud7af]")
_PLAIN_PI = re.compile(r"(?<![\\A-Za-z])pi(?![A-Za-z])")
_ROOT_SIGN = re.compile(r"\N{SQUARE ROOT}\s*\(?(\w+)\)?")


@dataclass(frozen=True)
class _Number:
    """decimals, digits: places after the point and significant figures as written."""

    value: Fraction
    exact: bool
    decimals: int = 0
    digits: int = 0


def _compare_single(answer: str, truth: str) -> Verdict:
    answer, answer_unit = _split_unit(answer)
    truth, truth_unit = _split_unit(truth)
    # A unit that one side leaves out is the question's.
    if answer_unit and truth_unit and not _same_unit(answer_unit, truth_unit):
        return Verdict(False, "unit")
    if _TIGHT.sub(r"\1", answer) == _TIGHT.sub(r"\1", truth):
        return Verdict(True, "exact")
    answer_number, truth_number = _parse_number(answer), _parse_number(truth)
    if answer_number is not None and truth_number is not None:
        return Verdict(_numbers_equal(answer_number, truth_number), "number")
    if _WORD.search(truth) and _words(answer) == _words(truth):
        return Verdict(True, "words")
    if not (_is_expression(answer) and _is_expression(truth)):
        return Verdict(False, "words")
    return Verdict(_expressions_equal(answer, truth), "expression")


def _split_unit(text: str) -> tuple[str, str]:
    """The text before its unit, and the unit in one spelling ("cm^2", "m/s"); "" if none."""
    if priced := _WITH_CURRENCY.fullmatch(text):
        return priced["sign"] + priced["body"], _CURRENCIES[priced["currency"]]
    match = _WITH_UNIT.fullmatch(text)
    if match is None:
        counted = _COUNTED.fullmatch(text)
        if counted is None or _NOT_COUNTED.fullmatch(counted["unit"]):
            return text, ""
        return counted["body"], counted["unit"].lower()
    unit = _spell_factor(match, "unit")
    return match["body"], f"{unit}/{_spell_factor(match, 'per')}" if match["per"] else unit


def _spell_factor(match: re.Match[str], name: str) -> str:
    square = match[f"{name}_square"] or match[f"{name}_squared"]
    cubic = match[f"{name}_cubic"] or match[f"{name}_cubed"]
    power = "2" if square else "3" if cubic else match[f"{name}_power"]
    return _UNITS[match[name]] + (f"^{power}" if power else "")


def _same_unit(unit: str, other: str) -> bool:
    """Equal, or one noun and its plural."""
    one, many = sorted((unit, other), key=len)
    plurals = [one + "s"]
    if one.endswith(("s", "x", "z", "ch", "sh", "o")):
        plurals.append(one + "es")
    elif one.endswith("y"):
        plurals.append(one[:-1] + "ies")
    # m and ms are no noun and its plural
    return one == many or (len(one) > 2 and many in plurals)


def _parse_number(text: str) -> _Number | None:
    match = _NUMBER.fullmatch(text)
    if match is None:
        return None
    scale = Fraction(-1 if match["sign"] == "-" else 1, 100 if match["percent"] else 1)
    if match["decimal"] is None:
        whole = int(match["whole"] or match["whole_before"] or 0)
        numerator = int(match["top"] or match["numerator"])
        denominator = int(match["bottom"] or match["denominator"])
        # 2 1/2 is a mixed number, 2 7/2 is not
        if not denominator or (whole and numerator >= denominator):
            return None
        return _Number(scale * (whole + Fraction(numerator, denominator)), True)
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


def _is_expression(text: str) -> bool:
    """Whether the text is one formula: no prose, no second value."""
    words = _LETTERS.findall(_LATEX_COMMAND.sub(" ", text))
    return (
        len(text) <= _MAX_EXPRESSION_CHARACTERS
        and all(len(word) < 3 or _FUNCTION.fullmatch(word) for word in words)
        and text.count("=") <= 1
        and _HEDGE.search(text) is None
        and _IDEOGRAPH.search(text) is None
    )


def _expressions_equal(answer: str, truth: str) -> bool:
    if any(answer.count(relation) != truth.count(relation) for relation in "=<>"):
        return False
    return expressions.latex_equal(_to_latex(answer), _to_latex(truth))


def _to_latex(text: str) -> str:
    text = _ROOT_SIGN.sub(r"\\sqrt{\1}", text.replace("**", "^"))
    text = _PLAIN_FUNCTION.sub(r"\\\1", text)
    return _PLAIN_PI.sub(r"\\pi ", text).replace("%", r"\%")
