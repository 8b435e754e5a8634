"""Rewards of responses: rules, comparisons and the judge; every key, its type, default, meaning."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from prism_megatron.config.sections import Defect, Section


class Judge(Section):
    """An LLM that judges answers, behind an OpenAI-compatible endpoint; off without a url."""

    url: str | None = None
    """Base address, such as http://host:8000/v1; chat/completions is appended."""
    model: str = ""
    """Name that the endpoint knows the model by."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the key; none is sent where it is not set."""
    prompt: Path | None = None
    """Text file of the system turn that tells the judge what to do; a built-in one if not set."""
    temperature: float = Field(0.0, ge=0)
    """Softmax temperature of the judge."""
    timeout: float = Field(60.0, gt=0)
    """Seconds that one request may take, from its connection to the end of the reply."""
    attempts: int = Field(5, ge=1)
    """Requests for one judgement before it counts as failed; waits between them double."""
    concurrency: int = Field(32, ge=1)
    """Requests at once, of each rank."""
    cache: Path | None = None
    """Folder of verdicts that later runs read instead of asking again."""
    max_failed_share: float = Field(0.1, ge=0, le=1)
    """Share of a step's judgements that may fail before the run stops; the rules decide in the
    place of those."""

    @model_validator(mode="after")
    def _a_model_is_named(self) -> Self:
        if (self.url is None) != (not self.model):
            raise ValueError(
                f"url={self.url} and model={self.model!r} belong together; set both or neither"
            )
        return self


class Rewards(Section):
    """What a response earns, and the processes that find it out."""

    rules: Defect = "corrected"
    """corrected: one comparison for all answers, by meaning; reference: those of the reference's
    reward functions, chosen by data_source, with their errors."""
    sources: dict[str, Literal["mm_gad", "geo3k", "math_verify", "llm_judge"]] = Field({})
    """Reward function of a data_source, beside those that the reference registers (mm_gad,
    hiyouga/geometry3k, math-77k, visual_logic-26k); mm_gad for all others. With rules=corrected
    only llm_judge makes a difference."""
    accuracy_weight: float = Field(0.8, ge=0)
    """Reward of a right answer in the right format."""
    format_weight: float = Field(0.2, ge=0)
    """Reward of the right format."""
    judge_weight: float = Field(0.0, ge=0)
    """Reward of an answer in the right format that the LLM judge takes for right."""
    judge: Judge = Judge()
    """Who judges."""
    workers: int = Field(4, ge=1)
    """Processes of each rank that compare answers."""
    timeout: float = Field(10.0, gt=0)
    """Seconds for one answer; it is wrong after that, and its process is replaced."""
    memory_gb: float = Field(2.0, gt=0)
    """GiB for one answer; it is wrong beyond that, and its process is replaced."""

    @model_validator(mode="after")
    def _the_judge_is_there_and_used(self) -> Self:
        used = self.judge_weight > 0 or "llm_judge" in self.sources.values()
        if used and self.judge.url is None:
            raise ValueError(
                f"judge_weight={self.judge_weight} and sources={self.sources} ask for an LLM "
                "judge, but judge.url is not set"
            )
        if not used and self.judge.url is not None:
            raise ValueError(
                f"judge.url={self.judge.url} is set, but nothing is judged; set judge_weight, or "
                "llm_judge for a data_source in sources"
            )
        return self
