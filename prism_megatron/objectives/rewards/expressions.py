"""Whether two mathematical expressions are equal, by math-verify.

What is asked here may take forever, such as the exact value of 9^9^9^9 that a policy is free to
write: call it in a process that can be killed (pool.py). math-verify's own time limits are off,
because they need SIGALRM on the main thread and do not stop a computation inside C.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from itertools import product
from typing import Any

from math_verify import (
    ExprExtractionConfig,
    LatexExtractionConfig,
    StringExtractionConfig,
    parse,
    verify,
)

# it warns of the time limits that are off, and of every formula that it can't read
logging.getLogger("math_verify").setLevel(logging.CRITICAL)

_LATEX = (LatexExtractionConfig(),)
_BOXED_TRUTH = (LatexExtractionConfig(), ExprExtractionConfig(), StringExtractionConfig())
_BOXED_ANSWER = (ExprExtractionConfig(), LatexExtractionConfig(), StringExtractionConfig())


def latex_equal(answer: str, truth: str) -> bool:
    """Whether two LaTeX formulas, without delimiters, are equal."""
    parsed = [
        _parse(f"${formula}$", _LATEX, fallback_mode="no_fallback") for formula in (truth, answer)
    ]
    return all(parsed) and _verify(*parsed)


def texts_equal(answers: Iterable[str], truths: Iterable[str]) -> bool:
    """Whether math-verify, as it comes, finds an equal value in any answer and any truth.

    It looks for a formula or a number anywhere in the text. Source: mm_gad_no_llm.py of the
    reference.
    """
    return any(_verify(_parse(t), _parse(a)) for t, a in product(list(truths), list(answers)))


def boxed_equal(answer: str, truth: str) -> bool:
    """The same for \\boxed{answer} and \\boxed{truth}, letters A to D included.

    Source: math_verify_with_format.py of the reference (math_metric there).
    """
    gold = _parse(rf"\boxed{{{truth}}}", _BOXED_TRUTH)
    return bool(gold) and _verify(gold, _parse(rf"\boxed{{{answer}}}", _BOXED_ANSWER))


def _parse(text: str, targets: Sequence[Any] | None = None, **options: Any) -> list[Any]:
    given = options if targets is None else {"extraction_config": targets, **options}
    found: list[Any] = parse(text, parsing_timeout=None, **given)
    return found


def _verify(truth: list[Any], answer: list[Any]) -> bool:
    return bool(verify(truth, answer, timeout_seconds=None))
