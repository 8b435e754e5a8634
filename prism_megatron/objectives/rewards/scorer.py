"""Rewards of responses.

    items --format, answer--> ComparisonPool --> right or wrong --weighted sum--> rewards
                        `---> LLMJudge, where asked for ---^

With `rules: corrected` all answers are compared by answers.py. With `rules: reference` the
data_source chooses one of the reference's reward functions:

    function      data_source                   format, answer         compared by    weights
    mm_gad        mm_gad, any that is unknown   lenient, the first     reference.py   configured
    math_verify   math-77k, visual_logic-26k    lenient, the first     math-verify    configured
    geo3k         hiyouga/geometry3k            tags in order, first   MathRuler      0.9, 0.1
    llm_judge     rewards.sources               lenient, the first     an LLM         1, 0

llm_judge is there with corrected rules too, with their format and the configured weights.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from prism_megatron.config.schema import Rewards
from prism_megatron.objectives.rewards import responses
from prism_megatron.objectives.rewards.judge import Judgement, LLMJudge
from prism_megatron.objectives.rewards.pool import ComparisonPool, Question
from prism_megatron.objectives.rewards.types import FAILURES, Reward, RewardItem, Verdict

MAX_ANSWER_CHARACTERS = 1024
DATA_SOURCES = {
    "mm_gad": "mm_gad",
    "hiyouga/geometry3k": "geo3k",
    "math-77k": "math_verify",
    "visual_logic-26k": "math_verify",
}
"""Reward function by data_source. Source: reward_score/__init__.py of the reference, which has more
of other projects and refuses what it does not know."""
REFERENCE_WEIGHTS = {
    "geo3k": (Fraction(9, 10), Fraction(1, 10), Fraction(0)),
    "llm_judge": (Fraction(1), Fraction(0), Fraction(0)),
}
"""Weights of accuracy, format and judge that the reference does not leave to the configuration."""
NO_EQUIVALENT_ANSWERS = "__EMPTY__"


@dataclass(frozen=True)
class _Task:
    """A response, its reward function, its format, and the answer that is to be judged; where there
    is none, rule says why."""

    item: RewardItem
    function: str
    format: bool
    answer: str
    rule: str = ""


class Scorer:
    """Rewards by configuration; holds the processes and connections that they take."""

    def __init__(self, config: Rewards) -> None:
        self.config = config
        self._follows_reference = config.rules == "reference"
        self._pool = ComparisonPool(config.workers, config.timeout, config.memory_gb)
        self._judge: LLMJudge | None = None
        if config.judge.url is not None:
            self._judge = LLMJudge(config.judge, lenient=self._follows_reference)

    def score(self, items: Sequence[RewardItem]) -> list[Reward]:
        """The reward of each item, in order. Equal outcomes have equal totals to the last bit.

        Raises ValueError if too many judgements of the LLM failed, RuntimeError if no process can
        compare answers.
        """
        tasks = [self._prepare(item) for item in items]
        judged = [task for task in tasks if not task.rule]
        verdicts = iter(self._pool.compare([self._question(task) for task in judged]))
        judgements = iter(self._judgements(judged))
        return [
            self._reward(task, Verdict(False, task.rule))
            if task.rule
            else self._reward(task, next(verdicts), next(judgements))
            for task in tasks
        ]

    def close(self) -> None:
        """End the processes and connections."""
        self._pool.close()
        if self._judge is not None:
            self._judge.close()

    def _prepare(self, item: RewardItem) -> _Task:
        function = (DATA_SOURCES | self.config.sources).get(item.data_source, "mm_gad")
        if not self._follows_reference:
            function = "llm_judge" if function == "llm_judge" else "corrected"
            # cut off, it has no answer, whatever it had written before
            found = responses.answer_of(item.response) if item.finished else None
            valid, answer = found is not None, found or ""
        elif function == "geo3k":
            valid = responses.has_geo3k_format(item.response)
            return _Task(item, function, valid, responses.reference_answer(item.response))
        else:
            valid = responses.has_reference_format(item.response)
            answer = responses.reference_answer(item.response)
        rule = ""
        if not valid:
            rule = "format" if item.finished else "unfinished"
        elif not answer:
            rule = "empty"
        elif len(answer) >= MAX_ANSWER_CHARACTERS:
            rule = "too long"
        return _Task(item, function, valid, answer, rule)

    def _question(self, task: _Task) -> Question:
        item, rules = task.item, task.function
        if rules == "llm_judge":
            # what decides should the judge fail
            rules = "mm_gad" if self._follows_reference else "corrected"
        equivalents = item.equivalent_answers
        # one placeholder voids them all
        if rules in ("mm_gad", "geo3k") or NO_EQUIVALENT_ANSWERS in equivalents:
            equivalents = ()
        return rules, task.answer, (item.ground_truth, *equivalents)

    def _judgements(self, tasks: Sequence[_Task]) -> list[bool | None]:
        """Of the tasks that the LLM is asked about; None for the others, and where it failed."""
        asked = [task for task in tasks if self._is_asked(task)]
        if self._judge is None or not asked:
            return [None] * len(tasks)
        judgements = [Judgement(t.answer, t.item.ground_truth, t.item.question) for t in asked]
        verdicts = iter(self._judge.judge(judgements))
        return [next(verdicts) if self._is_asked(task) else None for task in tasks]

    def _is_asked(self, task: _Task) -> bool:
        """Whether the LLM judges it."""
        return not task.rule and (task.function == "llm_judge" or self.config.judge_weight > 0)

    def _reward(self, task: _Task, verdict: Verdict, judged: bool | None = None) -> Reward:
        """The weighted sum, exact until it is rounded once."""
        correct, rule = verdict
        if self._is_asked(task):
            if judged is None:
                judged, rule = correct, "judge failed"
            elif task.function == "llm_judge":
                correct, rule = judged, "judge"
        terms = (correct, task.format, bool(judged))
        weights = self._weights(task.function)
        total = sum(weight * term for weight, term in zip(weights, terms, strict=True))
        return Reward(float(total), float(correct), float(task.format), rule)

    def _weights(self, function: str) -> tuple[Fraction, ...]:
        """Of accuracy, format and the judge's verdict."""
        if self._follows_reference and function in REFERENCE_WEIGHTS:
            return REFERENCE_WEIGHTS[function]
        config = self.config
        written = (config.accuracy_weight, config.format_weight, config.judge_weight)
        # 0.8 means four fifths, not the binary number next to it
        return tuple(Fraction(str(weight)) for weight in written)


def failure_counts(rewards: Iterable[Reward]) -> dict[str, float]:
    """How many rewards came about by each of FAILURES, by metric name."""
    counts = Counter(reward.rule for reward in rewards)
    return {f"reward_{rule.replace(' ', '_')}": float(counts[rule]) for rule in FAILURES}
