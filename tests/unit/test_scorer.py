"""Rewards: formats, weights, reward functions by data_source, what failed."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prism_megatron.config import load as configuration
from prism_megatron.config.schema import RLVR, Rewards
from prism_megatron.objectives.rewards.scorer import Scorer, failure_counts
from prism_megatron.objectives.rewards.types import FAILURES, Reward, RewardItem


def response(answer: str, caption: str = " 3 8 ", think: str = " 3 + 8 = 11 ") -> str:
    return f"<caption>{caption}</caption><think>{think}</think><answer>{answer}</answer>"


@pytest.fixture(scope="module")
def corrected() -> Iterator[Scorer]:
    scorer = Scorer(Rewards(workers=2))
    yield scorer
    scorer.close()


@pytest.fixture(scope="module")
def reference() -> Iterator[Scorer]:
    scorer = Scorer(Rewards(rules="reference", workers=1, sources={"mine": "math_verify"}))
    yield scorer
    scorer.close()


def score(scorer: Scorer, text: str, truth: str = "11", source: str = "mm_gad") -> Reward:
    [reward] = scorer.score([RewardItem(text, truth, source)])
    return reward


def test_reward_weighs_accuracy_and_format(corrected: Scorer) -> None:
    assert score(corrected, response(" 11 ")) == Reward(1.0, 1.0, 1.0, "exact")
    assert score(corrected, response(" 12 ")) == Reward(0.2, 0.0, 1.0, "number")


@pytest.mark.parametrize(
    ("accuracy", "format_", "right", "wrong"),
    [(0.8, 0.2, 1.0, 0.2), (0.9, 0.1, 1.0, 0.1), (0.7, 0.1, 0.8, 0.1), (0.1, 0.2, 0.3, 0.2)],
)
def test_sums_are_those_of_the_weights_as_written(
    accuracy: float, format_: float, right: float, wrong: float
) -> None:
    # as binary numbers 0.7 + 0.1 and 0.1 + 0.2 are none of these
    scorer = Scorer(Rewards(accuracy_weight=accuracy, format_weight=format_, workers=1))
    rewards = scorer.score([RewardItem(response(text), "11") for text in ("11", "12")])
    scorer.close()
    assert [reward.total for reward in rewards] == [right, wrong]


@pytest.mark.parametrize(
    "text",
    [
        "11",
        "<answer>11</answer>",
        response("11") + " 11",
        response("11", think="<answer>11</answer>"),
        response("12") + response("11"),
        response("11", caption=" "),
        response("11").replace("think", "thought"),
    ],
)
def test_right_answer_in_wrong_format_earns_nothing(corrected: Scorer, text: str) -> None:
    assert score(corrected, text) == Reward(0.0, 0.0, 0.0, "format")


def test_an_answer_of_1024_characters_is_not_looked_at(
    corrected: Scorer, reference: Scorer
) -> None:
    for scorer in (corrected, reference):
        longest = score(scorer, response("1" * 1023), "1" * 1023)
        assert longest == Reward(1.0, 1.0, 1.0, "exact")
        assert score(scorer, response("1" * 1024), "1" * 1024) == Reward(0.2, 0.0, 1.0, "too long")


def test_a_response_that_was_cut_off_has_no_answer(corrected: Scorer, reference: Scorer) -> None:
    item = RewardItem(response("11"), "11", "mm_gad", finished=False)
    assert corrected.score([item]) == [Reward(0.0, 0.0, 0.0, "unfinished")]
    assert reference.score([item]) == [Reward(1.0, 1.0, 1.0, "exact")]


def test_any_equivalent_answer_counts(corrected: Scorer, reference: Scorer) -> None:
    def scored(scorer: Scorer, source: str, equivalents: tuple[str, ...]) -> float:
        item = RewardItem(response("12"), "11", source, equivalents)
        return scorer.score([item])[0].accuracy

    assert scored(corrected, "any", ("XII", "12")) == 1
    assert scored(corrected, "any", ("12", "__EMPTY__")) == 0
    assert scored(reference, "math-77k", ("XII", "12")) == 1
    assert scored(reference, "math-77k", ("12", "__EMPTY__")) == 0
    assert scored(reference, "mm_gad", ("XII", "12")) == 0


def test_the_reference_takes_the_first_answer_and_lets_empty_sections_pass(
    reference: Scorer,
) -> None:
    early = response("11", think="<answer>12</answer>")
    assert score(reference, early, "12") == Reward(1.0, 1.0, 1.0, "exact")
    empty = "<caption></caption><think></think><answer></answer>"
    assert score(reference, empty) == Reward(0.2, 0.0, 1.0, "empty")
    assert score(reference, response("11") + " 11") == Reward(0.0, 0.0, 0.0, "format")
    assert score(reference, response("11").replace("think", "thought")).total == 0


def test_data_sources_choose_the_references_reward_functions(reference: Scorer) -> None:
    loose = "so " + response("11") + " done"
    assert score(reference, loose, source="hiyouga/geometry3k") == Reward(
        1.0, 1.0, 1.0, "mathruler"
    )
    no_format = "<answer>11</answer>"
    geo3k = score(reference, no_format, source="hiyouga/geometry3k")
    assert geo3k == Reward(0.9, 1.0, 0.0, "mathruler")
    wrong = score(reference, response("12"), source="hiyouga/geometry3k")
    assert wrong == Reward(0.1, 0.0, 1.0, "mathruler")
    for source in ("math-77k", "visual_logic-26k", "mine"):
        assert score(reference, response("22/2"), source=source).rule == "math-verify"
    for source in ("mm_gad", "somewhere else"):
        assert score(reference, response("12"), "(1,2)", source) == Reward(1.0, 1.0, 1.0, "words")


@pytest.mark.parametrize("source", ["mm_gad", "hiyouga/geometry3k", "math-77k", "any"])
def test_corrected_rules_are_the_same_for_all_data_sources(corrected: Scorer, source: str) -> None:
    assert score(corrected, response("1,100"), "1100", source) == Reward(1.0, 1.0, 1.0, "number")
    assert score(corrected, "so " + response("11"), source=source).total == 0


def test_rewards_come_in_order_also_of_those_that_need_no_comparison(corrected: Scorer) -> None:
    texts = [response("11"), "?", response("12"), response(""), response("22/2"), "11"]
    rewards = corrected.score([RewardItem(text, "11") for text in texts])
    assert [reward.rule for reward in rewards] == [
        "exact",
        "format",
        "number",
        "format",
        "number",
        "format",
    ]


def test_what_got_no_verdict_is_wrong_and_counted() -> None:
    scorer = Scorer(Rewards(workers=1, timeout=1.5))
    hostile = RewardItem(response("9^{9^{9^{9^{9}}}}"), "9^{9^{9^{9}}} + 1")
    try:
        scorer.score([RewardItem(response("2x+x"), "3x")])
        rewards = scorer.score([RewardItem(response("11"), "11"), hostile])
    finally:
        scorer.close()
    assert rewards[1] == Reward(0.2, 0.0, 1.0, "timeout")
    assert failure_counts(rewards) == {
        "reward_timeout": 1.0,
        "reward_memory": 0.0,
        "reward_crash": 0.0,
        "reward_error": 0.0,
        "reward_judge_failed": 0.0,
    }
    assert len(FAILURES) == 5


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["11", "12", "(1,2)", "22/2", "1 1", "A", "x" * 1024, "", "50%"]),
            st.sampled_from(["{}", "<caption>c</caption>\n<think>t</think><answer>{}</answer>"]),
            st.sampled_from(["mm_gad", "hiyouga/geometry3k", "math-77k", "?"]),
        ),
        max_size=8,
    )
)
@settings(deadline=None, max_examples=40)
def test_rewards_lie_within_bounds_and_follow_from_their_terms(
    corrected: Scorer, reference: Scorer, drawn: list[tuple[str, str, str]]
) -> None:
    items = [RewardItem(frame.format(text), "11", source) for text, frame, source in drawn]
    for scorer in (corrected, reference):
        rewards = scorer.score(items)
        assert len(rewards) == len(items)
        for item, reward in zip(items, rewards, strict=True):
            assert {reward.accuracy, reward.format} <= {0.0, 1.0}
            weight = Fraction(4, 5)
            if scorer is reference and item.data_source == "hiyouga/geometry3k":
                weight = Fraction(9, 10)
            terms = Fraction(reward.accuracy), Fraction(reward.format)
            assert reward.total == float(weight * terms[0] + (1 - weight) * terms[1])
            assert 0 <= reward.total <= 1


def test_data_sources_of_ones_own_are_configured_by_name(tmp_path: Path) -> None:
    overlay = tmp_path / "rewards.yaml"
    overlay.write_text("rewards: {rules: reference, sources: {me/sums.v2: geo3k}}\n")
    quickstart = Path(__file__).parents[2] / "configs/quickstart/rlvr.yaml"
    config = configuration.load("rlvr", [quickstart, overlay], ["rewards.timeout=3"])
    assert isinstance(config, RLVR)
    assert config.rewards == Rewards(rules="reference", sources={"me/sums.v2": "geo3k"}, timeout=3)
    printed = {key: kind for key, kind, _ in configuration.describe(RLVR)}
    assert printed["rewards.sources"] == (
        "mapping to mm_gad|geo3k|math_verify|llm_judge, default {}"
    )
    with pytest.raises(ValueError, match=r"rewards.sources.me/sums.v2: 'geo' given"):
        overlay.write_text("rewards: {sources: {me/sums.v2: geo}}\n")
        configuration.load("rlvr", [quickstart, overlay], [])
