"""What is rewarded, and what a reward says of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

FAILURES = ("timeout", "memory", "crash", "error", "judge failed")
"""Rules of rewards that came about because something gave no verdict: the comparison ran out of
time or memory, ended its process or raised, or the LLM judge did not answer."""


@dataclass(frozen=True)
class RewardItem:
    """A response with what it is judged by; names as in verl's reward functions.

    finished: the policy ended it, instead of running into the length limit.
    """

    response: str
    ground_truth: str
    data_source: str = ""
    equivalent_answers: tuple[str, ...] = ()
    question: str = ""
    finished: bool = True


@dataclass(frozen=True)
class Reward:
    """accuracy and format are 0 or 1, total is the weighted sum.

    rule: what decided the accuracy, such as "format", "number" or "timeout".
    """

    total: float
    accuracy: float
    format: float
    rule: str


class Verdict(NamedTuple):
    """Whether an answer is right, and the rule that decided."""

    correct: bool
    rule: str
