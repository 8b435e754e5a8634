"""The process that compares answers: one question a line in, one verdict a line out.

    [rules, answer, truths] --stdin--> compare --stdout--> [correct, rule], or null if it raised

pool.py starts it and kills it. It imports neither torch nor transformers, so that it starts fast.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Sequence

from prism_megatron.objectives.rewards import answers, expressions, reference
from prism_megatron.objectives.rewards.types import Verdict


def compare(rules: str, answer: str, truths: Sequence[str]) -> Verdict:
    """Whether the answer equals one of the truths, of which the first is the ground truth.

    rules: "corrected" or, with the reference's verdicts, "mm_gad", "geo3k" or "math_verify".
    """
    verdicts = [_COMPARISONS[rules](answer, truths[0])]
    for truth in truths[1:]:
        if verdicts[-1].correct:
            break
        verdicts.append(_COMPARISONS[rules](answer, truth))
    return verdicts[-1] if verdicts[-1].correct else verdicts[0]


def _geo3k(answer: str, truth: str) -> Verdict:
    """Source: geo3k.py of the reference, which grades with MathRuler."""
    # the one comparison that needs it
    from mathruler.grader import grade_answer

    return Verdict(bool(grade_answer(answer, truth)), "mathruler")


def _math_verify(answer: str, truth: str) -> Verdict:
    return Verdict(expressions.boxed_equal(answer, truth), "math-verify")


_COMPARISONS: dict[str, Callable[[str, str], Verdict]] = {
    "corrected": answers.compare,
    "mm_gad": reference.compare,
    "geo3k": _geo3k,
    "math_verify": _math_verify,
}


def serve(seconds: float) -> None:
    """Answer questions until stdin ends. seconds: processor time that one may take at most."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when this ends
    # libraries print: what goes to the parent gets a descriptor of its own
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        _limit_processor_time(seconds)
        try:
            verdict = compare(*json.loads(line))
        except Exception:
            traceback.print_exc()
            verdict = None
        print(json.dumps(verdict), file=replies, flush=True)


def _limit_processor_time(seconds: float) -> None:
    """The parent's clock ends a question first; this ends one whose parent was killed."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    spent = used.ru_utime + used.ru_stime
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (int(spent + seconds) + 2, hard))
