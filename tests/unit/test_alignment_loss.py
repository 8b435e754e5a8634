"""The discriminator's loss of a step and what the policy gets from its scores, by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoProcessor

from prism_megatron.config import load, schema
from prism_megatron.data.prompts import PromptEncoder
from prism_megatron.pipelines.alignment import Game, Stream
from prism_megatron.training.discriminator import Reader
from prism_megatron.types import Prompt, Rollout, Sequence
from tests import tiny_models

QUICKSTART = Path(__file__).resolve().parents[2] / "configs" / "quickstart" / "align.yaml"
# two prompts, of whose four responses the third is ill-formed
GROUPS = torch.tensor([0, 0, 1, 1])
VALID = torch.tensor([True, True, False, True])
# teachers' scores, valid responses', none of others
CAPTION = torch.tensor([1.0, -0.5]), torch.tensor([0.0, 2.0, -0.5]), torch.zeros(0)
REASONING = torch.tensor([0.5, 0.0]), torch.tensor([0.5, 0.5, 1.0]), torch.zeros(0)


def game(*overrides: str) -> Any:
    """The rules of the game without players."""
    found = object.__new__(Game)
    config = load.load("align", QUICKSTART, overrides)
    assert isinstance(config, schema.Align)
    found.config = config
    return found


@pytest.mark.parametrize(
    ("regulariser", "penalty", "wanted"),
    [
        # gaps 1, -1, 0 and 0, 0, -1
        (0.0, 0.0, (0.313262 + 1.313262 + 0.693147) / 3 + (2 * 0.693147 + 1.313262) / 3),
        # ten scores, whose squares sum up to 7.25
        (0.1, 0.0, 0.773224 + 0.899852 + 0.1 * 0.725),
        # teachers' scores change by 0.2, 0, 0 and 0.4
        (0.1, 2.0, 0.773224 + 0.899852 + 0.1 * 0.725 + 2.0 * 0.05),
    ],
)
def test_the_corrected_loss(regulariser: float, penalty: float, wanted: float) -> None:
    rules = game(f"score_reg_coef={regulariser}", f"gradient_penalty_coef={penalty}")
    noisy = torch.tensor([1.2, -0.5, 0.5, 0.4]) if penalty else torch.zeros(0)
    loss = rules._loss([CAPTION, REASONING], noisy, GROUPS, VALID, [])
    assert float(loss) == pytest.approx(wanted, abs=1e-5)


def section(tokens: int) -> Sequence:
    mask = torch.arange(tokens + 2) >= 2
    return Sequence(torch.zeros(tokens + 2, dtype=torch.int64), (), mask, {})


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        ((), [2.0, -3.0, 0.0, 0.5]),
        # log(1 + 3), log(1 + 7), log(1 + 1)
        (
            ("score_length_correction_beta=0.5",),
            [2 - math.log(2), -3 - 1.039721, 0, 0.5 - 0.346574],
        ),
        # bounded before
        (
            (
                "score_length_correction_beta=0.5",
                "discriminator.score_bound=clip",
                "discriminator.score_limit=1.5",
            ),
            [1.5 - math.log(2), -1.5 - 1.039721, 0, 0.5 - 0.346574],
        ),
    ],
)
def test_long_sections_earn_less(overrides: tuple[str, ...], wanted: list[float]) -> None:
    students = [section(3), section(7), section(1)]
    scores = torch.tensor([9.0, 2.0, -3.0, 0.5])
    stream = Stream(0.5, [section(5)], students, [], scores)
    found = game(*overrides)._rewards(stream, VALID)
    torch.testing.assert_close(found, torch.tensor(wanted), atol=1e-5, rtol=0)


def test_no_sampled_response_ends_the_game(tmp_path: Path) -> None:
    processor = AutoProcessor.from_pretrained(tiny_models.save_with_processor(tmp_path))
    processor.tokenizer.add_special_tokens({"extra_special_tokens": ["[STOP]"]})
    encoder = PromptEncoder(
        processor, system_prompt=None, max_prompt_tokens=9, max_response_tokens=30
    )
    rules = game()
    rules.reader = Reader(encoder, rules.config.discriminator, sampled_tokens=400)
    prompt = Prompt("row", (5, 6, 7), ())

    def read(think: str, finish_reason: str = "stop") -> Any:
        text = f"<caption>c</caption><think>{think}</think><answer>7</answer>"
        ids = (*encoder.tokenizer(text, add_special_tokens=False).input_ids, encoder.end_id)
        return rules._read(prompt, Rollout(ids, (0.0,) * len(ids), finish_reason, 0))

    # longer than a text that is data may be, and than what a micro-batch holds
    lengths = [len(read("1 2 3 " * times)["reasoning"]) for times in (1, 20, 200)]
    assert lengths[0] < 3 + 100 < lengths[1] < lengths[2] == 400
    assert read("1 2 3", "length") is None
    # a control token of this tokenizer that does not look like Qwen's
    assert read("[STOP]") is None
