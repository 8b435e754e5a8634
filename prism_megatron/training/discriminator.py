"""The discriminator in training: scores of sections, and one adversarial update from them.

    answer --Reader--> one sequence a stream, caption and reasoning or the whole response
    sequences --packed--> score at each sequence's last token [n]
    scores --objective--> loss, d loss / d score --second pass--> gradients of the weights

The objective compares scores of different sequences, teacher with student, which would have to
share a micro-batch. Since nothing changes between scoring and update, the loss's gradient with
respect to each score is known after scoring, and the update runs over the sequences in any packing
with the loss sum(coefficient * score), whose gradient is the same. In the alignment stage the
scores are those that the advantages need anyway, and each teacher section is run once per prompt
instead of once per response.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from model_providers.config import SECTIONS
from prism_megatron.config import schema
from prism_megatron.config.schema import Defect
from prism_megatron.data.prompts import PromptEncoder
from prism_megatron.objectives.sections import STREAMS, Sections
from prism_megatron.training.runner import ModelRunner, StepResult
from prism_megatron.types import Noise, PackedBatch, Prompt, Sequence

SECTION_OF = {"caption": SECTIONS.index("perception"), "reasoning": SECTIONS.index("reasoning")}
"""What a dedicated discriminator judges a stream by."""
REFERENCE_TEACHER_TOKENS = 512
"""Where the reference cuts the teacher's sections (rl_dataset.py: max_response_length)."""

Objective = Callable[[Tensor], Tensor]
"""scores [n] -> loss."""


class Reader:
    """What the discriminator is shown of an answer, as its section of the configuration says.

    teacher_length, section_ends: see schema.Align, whose defects of the reference they are.
    """

    def __init__(
        self,
        encoder: PromptEncoder,
        section: schema.Discriminator,
        *,
        teacher_length: Defect = "corrected",
        section_ends: Defect = "corrected",
    ) -> None:
        self.encoder, self.text_only = encoder, section.text_only
        self.streams = STREAMS[section.streams]
        self.teacher_length, self.section_ends = teacher_length, section_ends

    def read(self, prompt: Prompt, answer: Sections, *, teacher: bool) -> dict[str, Sequence]:
        """A sequence for each of `streams`; RowError if one can't be encoded."""
        return {
            stream: self._ended(
                self.encoder.section_sequence(
                    prompt,
                    answer.read_by(stream),
                    section=SECTION_OF.get(stream, 0),
                    text_only=self.text_only,
                ),
                stream,
                teacher,
            )
            for stream in self.streams
        }

    def _ended(self, sequence: Sequence, stream: str, teacher: bool) -> Sequence:
        """The sequence with the reference's cut and its last token, where they are asked for."""
        ids, end = sequence.input_ids[:-1], sequence.input_ids[-1:]
        limit = len(sequence)
        if teacher and self.teacher_length == "reference":
            limit = int((~sequence.response_mask).sum()) + REFERENCE_TEACHER_TOKENS
        if self.section_ends == "reference" and teacher:
            end = torch.full_like(end, self.encoder.pad_id)[: int(len(ids) < limit)]
        elif self.section_ends == "reference" and stream == "caption":
            end = end[:0]
        ids = torch.cat([ids[:limit], end])
        return replace(sequence, input_ids=ids, response_mask=sequence.response_mask[: len(ids)])


def _ends(batch: PackedBatch) -> Tensor:
    return batch.cu_seqlens[1 : batch.num_sequences + 1].long() - 1


def score(model: ModelRunner, sequences: list[Sequence]) -> Tensor:
    """Score of each sequence at its last token, [n] fp32 on every rank.

    All sequences end with the end-of-turn token, teacher's and student's alike. (The reference
    reads a different kind of token for each, which alone tells them apart: value_head.py.)
    """
    return torch.stack(model.infer(sequences, lambda out, batch: list(out[_ends(batch)].cpu())))


def noisy(sequences: list[Sequence], std: float, step: int) -> list[Sequence]:
    """The same with noise on their embeddings, another for each step and sequence."""
    seeds = torch.Generator().manual_seed(step)
    return [
        replace(s, noise=Noise(int(torch.randint(2**62, (), generator=seeds)), std))
        for s in sequences
    ]


def update(
    model: ModelRunner, sequences: list[Sequence], scores: Tensor, objective: Objective
) -> StepResult:
    """One optimizer step on objective(scores); `scores` are the model's current ones, [n]."""
    scores = scores.detach().requires_grad_()
    objective(scores).backward()
    assert scores.grad is not None
    weighted = [
        replace(sequence, per_token={"coefficient": _at_the_end(sequence, coefficient)})
        for sequence, coefficient in zip(sequences, scores.grad, strict=True)
    ]
    return model.train_step(weighted, _linear_loss)


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
    """Sum of coefficient times score. A batch's per-token values stand where their token is
    predicted, one position before the token itself."""
    ends = _ends(batch)
    coefficients = batch.per_token["coefficient"][ends - 1]
    # an empty row still has to take part in the backward pass of its expert-parallel group
    return (output[ends] * coefficients).sum() + 0.0 * output.sum(), {}
