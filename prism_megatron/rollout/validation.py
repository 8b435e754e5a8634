"""Held-out prompts that the policy answers while it is trained.

after the sync of every validation.every-th step and the last one:
    held-out rows --engines, greedy by default--> responses --rewards--> validation/* of the metrics
"""

from __future__ import annotations

from prism_megatron.config import schema
from prism_megatron.data.prompts import PromptEncoder
from prism_megatron.data.rows import PromptRow, read_prompts
from prism_megatron.data.sources import open_sources
from prism_megatron.data.stream import convert_all
from prism_megatron.objectives.rewards.scorer import Scorer
from prism_megatron.phases import phase
from prism_megatron.rollout.fleet import Fleet, share_out
from prism_megatron.rollout.rewards import reward_item
from prism_megatron.training.setup import open_quarantine
from prism_megatron.training.watchdog import reached
from prism_megatron.types import Prompt


class Validator:
    """All ranks call it together, and get the same."""

    def __init__(
        self,
        config: schema.Align | schema.RLVR,
        encoder: PromptEncoder,
        engine: Fleet,
        scorer: Scorer,
    ) -> None:
        """Reads the rows, if there is to be validation. Those that can't be used go to
        validation_quarantine.jsonl; ValueError if too many do, or none is left."""
        self.config, self.encoder, self.engine, self.scorer = config, encoder, engine, scorer
        self._examples = _read(config, config.validation, encoder) if config.validation else []

    def metrics(self, step: int) -> dict[str, float]:
        """Means over the rows after `step` updates, whose weights the engines have and nothing to
        do; none where no validation is due.

        accuracy: of all responses; best_of_n: share of the rows with a right one, where there are
        several.
        """
        section, sampling = self.config.validation, self.config.sampling
        if section is None or (step % section.every and step != self.config.train.steps):
            return {}
        settings = {"n": section.n, "temperature": section.temperature}
        with phase("rollout"):
            reached("validation", self.config.rollout.patience)
            prompts = [prompt for _, prompt in self._examples]
            self.engine.submit(prompts, sampling.model_copy(update=settings), step)
            answered = self.engine.collect(step)
        rollouts = [rollout for group in answered for rollout in group]
        rows = [row for row, _ in self._examples for _ in range(section.n)]
        with phase("score"):
            items = [
                reward_item(
                    row,
                    self.encoder.decode(rollout.ids, self.scorer.config.rules),
                    finished=rollout.finish_reason == "stop",
                )
                for row, rollout in zip(rows, rollouts, strict=True)
            ]
            rewards = share_out(items, self.scorer.score)
        right = [reward.accuracy for reward in rewards]
        groups = [right[i : i + section.n] for i in range(0, len(right), section.n)]
        means = {
            "accuracy": right,
            "format_rate": [reward.format for reward in rewards],
            "finished_rate": [rollout.finish_reason == "stop" for rollout in rollouts],
            "response_tokens": [len(rollout.ids) for rollout in rollouts],
            **({"best_of_n": [max(group) for group in groups]} if section.n > 1 else {}),
        }
        return {f"validation/{name}": sum(values) / len(values) for name, values in means.items()}


def _read(
    config: schema.Align | schema.RLVR, section: schema.Validation, encoder: PromptEncoder
) -> list[tuple[PromptRow, Prompt]]:
    quarantine = open_quarantine(config.run, config.data, "validation_quarantine.jsonl")
    source = schema.Source(path=section.path, num_samples=section.rows)
    examples = convert_all(
        open_sources(
            config.data.model_copy(update={"path": None, "sources": (source,)}), read_prompts
        ),
        lambda row: (row, encoder.encode_prompt(row)),
        quarantine,
    )
    if not examples:
        raise ValueError(
            f"validation.path={section.path} has no row that can be used: see {quarantine.path}"
        )
    return examples
