"""The discriminator in training: scores of sections, and one adversarial update from them.

    answer --Reader--> one sequence a stream, caption and reasoning or the whole response
    sequences --packed--> score at each sequence's last token [n]
    scores --objective--> loss, d loss / d score --second pass--> gradients of the weights
    (with dropout, scores of the update are computed with the same inputs missing)

The objective compares scores of different sequences, teacher with student, which would have to
share a micro-batch. Since nothing changes between scoring and update, the loss's gradient with
respect to each score is known after scoring, and the update runs over the sequences in any packing
with the loss sum(coefficient * score), whose gradient is the same. In the alignment stage the
scores are those that the advantages need anyway, and each teacher section is run once per prompt
instead of once per response.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from checkpoint_tools import hf_writer, world
from checkpoint_tools.files import replace_folder, staging_of
from checkpoint_tools.headers import hf_directory
from model_providers.architecture import SECTIONS
from prism_megatron.config import schema
from prism_megatron.config.schema import Defect
from prism_megatron.data.prompts import PromptEncoder
from prism_megatron.objectives.sections import STREAMS, Sections
from prism_megatron.phases import phase
from prism_megatron.training.runner import ModelRunner, StepResult
from prism_megatron.types import Dropout, Noise, PackedBatch, Prompt, Sequence

SECTION_OF = {"caption": SECTIONS.index("perception"), "reasoning": SECTIONS.index("reasoning")}
"""What a dedicated discriminator judges a stream by."""
REFERENCE_TEACHER_TOKENS = 512
"""Where the reference cuts the teacher's sections (rl_dataset.py: max_response_length)."""
REFERENCE_DROPOUT = 0.1
"""Share of the value head's inputs that the reference drops in training (value_head.py)."""

SHOWN = ("streams", "text_only")
"""What warm-up and alignment must have the same, of schema.Discriminator."""

Objective = Callable[[Tensor], Tensor]
"""scores [n] -> loss."""


def record_shown(section: schema.Discriminator, folder: Path) -> Path:
    """Write `folder`: config and processor of the discriminator, whose config.json says what it is
    shown, so that `check_shown` can tell. All ranks call this and get `folder`."""
    source = hf_directory(section.path)

    def write() -> None:
        staging = staging_of(folder)
        shutil.rmtree(staging, ignore_errors=True)
        hf_writer.copy_config(source, staging)
        raw = json.loads((source / "config.json").read_text())
        shown = {name: getattr(section, name) for name in SHOWN}
        raw["prism_discriminator"] = raw.get("prism_discriminator", {}) | shown
        (staging / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
        replace_folder(staging, folder)

    world.first(write)
    return folder


def check_shown(section: schema.Discriminator) -> None:
    """ValueError if the discriminator was warmed up on something else than the section shows it.
    Those that say nothing of it, such as the reference's, are taken for right."""
    raw = json.loads((hf_directory(section.path) / "config.json").read_text())
    stored = raw.get("prism_discriminator", {})
    for name in SHOWN:
        learned, given = stored.get(name), getattr(section, name)
        if learned is not None and learned != given:
            raise ValueError(
                f"discriminator.{name}={json.dumps(given)}, but {section.path} was warmed up with "
                f"model.{name}={json.dumps(learned)} and has learned to judge nothing else; set "
                f"discriminator.{name}={json.dumps(learned)}, or warm it up with model.{name}="
                f"{json.dumps(given)}"
            )


class Reader:
    """What the discriminator is shown of an answer, as its section of the configuration says.

    A section read here from text is tokenised the same way on both sides and closed by the same
    token, at which it is scored, so that neither tokenisation nor ending tells teacher and student
    apart; the switches bring the reference's differences.
    """

    def __init__(
        self,
        encoder: PromptEncoder,
        section: schema.Discriminator,
        *,
        teacher_length: Defect = "corrected",
        section_ends: Defect = "corrected",
        line_end: bool = False,
        sampled_tokens: int | None = None,
    ) -> None:
        """teacher_length, section_ends: see schema.Align, whose defects of the reference they are;
        line_end: see schema.Warmup.section_ends. sampled_tokens: students are sampled now, so that
        data.max_response_tokens does not hold for them, and their sequences have so many tokens at
        most: tokenised anew a text can have some more than it was sampled with, which are cut off
        before the end. None: they are data like the teachers."""
        self.encoder, self.text_only = encoder, section.text_only
        self.streams = STREAMS[section.streams]
        self.teacher_length, self.section_ends = teacher_length, section_ends
        self.sampled_tokens = sampled_tokens
        self.end = (encoder.end_id, *(encoder.encode_section("\n") if line_end else ()))

    def read(self, prompt: Prompt, answer: Sections, *, teacher: bool) -> dict[str, Sequence]:
        """A sequence for each of `streams`; RowError if one can't be encoded."""
        is_sampled = not teacher and self.sampled_tokens is not None
        found = {}
        for stream in self.streams:
            ids = self.encoder.encode_section(answer.read_by(stream), is_sampled=is_sampled)
            ids = self._ended(ids, stream, teacher)
            found[stream] = self._sequence(prompt, stream, ids, is_sampled=is_sampled)
        return found

    def read_sampled(
        self, prompt: Prompt, ids: tuple[int, ...], caption_tokens: int
    ) -> dict[str, Sequence]:
        """The same of a student's tokens as they were sampled, of which the first `caption_tokens`
        are taken for the caption."""
        parts = {
            "caption": ids[:caption_tokens],
            "reasoning": ids[caption_tokens:],
            "response": ids,
        }
        found = {}
        for stream in self.streams:
            part = parts[stream]
            if self.section_ends == "corrected":
                part = part if part[-1:] == self.end else (*part, *self.end)
            # a single token has no second half: the reference takes the padding behind it
            ids_shown = part or (self.encoder.pad_id,)
            found[stream] = self._sequence(prompt, stream, ids_shown, is_sampled=True)
        return found

    def _sequence(
        self, prompt: Prompt, stream: str, ids: tuple[int, ...], *, is_sampled: bool
    ) -> Sequence:
        if is_sampled and self.sampled_tokens is not None:
            room = self.sampled_tokens - len(prompt.input_ids)
            # the last one is where the score is read
            ids = ids if len(ids) <= room else (*ids[: room - 1], ids[-1])
        section = SECTION_OF.get(stream, 0)
        return self.encoder.section_sequence(prompt, ids, section=section, text_only=self.text_only)

    def _ended(self, ids: tuple[int, ...], stream: str, teacher: bool) -> tuple[int, ...]:
        """The section's tokens with the reference's cut and end, where they are asked for."""
        is_cut = teacher and self.teacher_length == "reference"
        ids = ids[:REFERENCE_TEACHER_TOKENS] if is_cut else ids
        if self.section_ends == "corrected":
            return (*ids, *self.end)
        if teacher:
            is_full = is_cut and len(ids) == REFERENCE_TEACHER_TOKENS
            return ids if is_full else (*ids, self.encoder.pad_id)
        return ids if stream == "caption" else (*ids, *self.end)


@phase("score")
def score(model: ModelRunner, sequences: list[Sequence]) -> Tensor:
    """Score of each sequence at its last token, or where Sequence.scored says, [n] fp32 on every
    rank."""
    return torch.stack(model.infer(sequences, lambda out, batch: list(out[batch.scored].cpu())))


def noisy(sequences: list[Sequence], std: float, step: int) -> list[Sequence]:
    """The same with noise on their embeddings, another for each step and sequence."""
    seeds = _seeds(sequences, step)
    return [replace(s, noise=Noise(seed, std)) for s, seed in zip(sequences, seeds, strict=True)]


def dropped_out(sequences: list[Sequence], update: int) -> list[Sequence]:
    """The same as the reference's value head sees them in training, with other inputs missing for
    each update and sequence."""
    return [
        replace(s, dropout=Dropout(seed, REFERENCE_DROPOUT))
        for s, seed in zip(sequences, _seeds(sequences, update), strict=True)
    ]


def _seeds(sequences: list[Sequence], seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2**62, (len(sequences),), generator=generator).tolist()


def update(
    model: ModelRunner,
    sequences: list[Sequence],
    scores: Tensor,
    loads: Tensor,
    objective: Objective,
) -> StepResult:
    """One optimizer step on objective(scores); `scores` are the model's current ones, [n], and
    loads the ModelRunner.loads of computing them."""
    scores = scores.detach().requires_grad_()
    objective(scores).backward()
    assert scores.grad is not None
    weighted = [
        replace(sequence, per_token={"coefficient": _at_the_end(sequence, coefficient)})
        for sequence, coefficient in zip(sequences, scores.grad, strict=True)
    ]
    return model.train_step(weighted, _linear_loss, loads)


def accuracy(teachers: list[Sequence], students: list[Sequence], gaps: Tensor) -> float:
    """Share of pairs with a positive gap (teacher minus student, [n]); a pair of equal texts,
    which nothing can tell apart, counts half."""
    equal = [torch.equal(t.input_ids, s.input_ids) for t, s in zip(teachers, students, strict=True)]
    return float(torch.where(torch.tensor(equal), 0.5, (gaps > 0).float()).mean())


def _at_the_end(sequence: Sequence, value: Tensor) -> Tensor:
    out = torch.zeros(len(sequence))
    out[-1] = value
    return out


def _linear_loss(output: Tensor, batch: PackedBatch) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum of coefficient times score. Coefficients belong to each sequence's last token, wherever
    it is scored; a batch's per-token values stand where their token is predicted, one position
    before the token itself."""
    last = batch.cu_seqlens[1 : batch.num_sequences + 1].long() - 1
    coefficients = batch.per_token["coefficient"][last - 1]
    # an empty row still has to take part in the backward pass of its expert-parallel group
    return (output[batch.scored] * coefficients).sum() + 0.0 * output.sum(), {}
