"""Stage 2, adversarial alignment: the policy learns to answer so that the discriminator can't tell
its captions and its reasoning from the teacher's, and the discriminator learns to tell.

    prompts x n ----> rollout engine (weights of version k) ----> responses
                                                                    |  split into sections
    teacher caption, teacher reasoning ----+                        v
                                           +--> discriminator --> scores a section
                                                     |              |
        update: teacher above student  <-------------+              v
        (Bradley-Terry + load balance)        group-normalise each stream, combine -> advantages
                                                                    |
    rollout engine (version k + 1) <---- weight sync <---- policy update (no KL, no reference)
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from checkpoint_tools.megatron_directory import hf_directory
from prism_megatron.config import schema
from prism_megatron.data.prompts import PromptEncoder
from prism_megatron.data.rows import BatchStream, PromptRow, RowError, read_prompts
from prism_megatron.objectives.advantages import alignment_advantage
from prism_megatron.objectives.losses import bradley_terry_loss, score_regulariser
from prism_megatron.objectives.sections import (
    Sections,
    response_text,
    sections_of,
    split_sections,
    token_bytes,
)
from prism_megatron.rollout import fleet
from prism_megatron.training import discriminator
from prism_megatron.training.loop import Metrics, TrainingLoop
from prism_megatron.training.policy import policy_update
from prism_megatron.training.runner import ModelRunner
from prism_megatron.training.setup import build_encoder, build_runner, open_quarantine, start
from prism_megatron.types import Prompt, Rollout, Sequence


@dataclass(frozen=True)
class Task:
    """A prompt with the teacher's answer to it, one sequence for each stream."""

    prompt: Prompt
    teacher: dict[str, Sequence]


def run(config: schema.Align) -> None:
    """Play the game for train.steps steps and export the policy to run.dir/hf."""
    backend = start(config.backend, config.policy, config.discriminator)
    encoder = build_encoder(config.policy.path, config.data)
    reader = discriminator.Reader(encoder, config.discriminator)
    quarantine = open_quarantine(config.run, config.data)
    stream = BatchStream(
        read_prompts(config.data.path, required=("teacher_caption", "teacher_cot")),
        lambda row: task(encoder, reader, row),
        quarantine,
        batch_size=config.prompts_per_step,
        seed=config.run.seed,
    )
    policy = build_runner(
        config.policy,
        config.policy_optimizer,
        backend,
        config.train,
        config.run,
        pad_id=encoder.pad_id,
    )
    judge = build_runner(
        config.discriminator,
        config.discriminator_optimizer,
        backend,
        config.train,
        config.run,
        pad_id=encoder.pad_id,
        head="score",
        aux_loss_coef=config.aux_loss_coef,
        z_loss_coef=config.z_loss_coef,
    )
    models = {
        "policy": (policy, config.policy.path),
        "discriminator": (judge, config.discriminator.path),
    }
    loop = TrainingLoop(config, models, stream, quarantine, shown="score_gap")
    done = loop.resume()
    engine = fleet.build(
        config.rollout,
        policy.model,
        hf_directory(config.policy.path),
        seed=config.run.seed,
        logs=config.run.dir / "engines",
    )
    game = Game(config, reader, policy, judge, engine)
    game.sync(done)
    if loop.run(lambda: game.step(stream.next_batch(), loop.step)):
        loop.export("policy")


def task(encoder: PromptEncoder, reader: discriminator.Reader, row: PromptRow) -> Task:
    """RowError if the teacher's answer itself has not the format that the student must learn."""
    teacher = sections_of(row.teacher_caption or "", row.teacher_cot or "")
    if teacher is None:
        raise RowError("teacher_caption and teacher_cot do not make up a well-formed response")
    prompt = encoder.encode_prompt(row)
    return Task(prompt, reader.read(prompt, teacher))


@dataclass
class Stream:
    """One part of the judgement, such as captions or reasoning, over the whole step.

    Sequences and scores: the teacher's, one a prompt, then those of the valid responses.
    """

    weight: float
    teacher: list[Sequence]
    student: list[Sequence]
    scores: Tensor = field(default_factory=lambda: torch.zeros(0))

    @property
    def sequences(self) -> list[Sequence]:
        return [*self.teacher, *self.student]


class Game:
    """The two players and the rollout engine."""

    def __init__(
        self,
        config: schema.Align,
        reader: discriminator.Reader,
        policy: ModelRunner,
        judge: ModelRunner,
        engine: fleet.Fleet,
    ) -> None:
        self.config, self.reader = config, reader
        self.policy, self.judge, self.engine = policy, judge, engine
        self.table = token_bytes(reader.encoder.tokenizer)

    def step(self, tasks: list[Task], number: int) -> Metrics:
        """Sample, judge, train the judge, train the policy, hand its weights to the engine."""
        rollouts = self.engine.generate([t.prompt for t in tasks], self.config.sampling, number)
        samples = [(t.prompt, r) for t, group in zip(tasks, rollouts, strict=True) for r in group]
        sections = [self._sections(rollout) for _, rollout in samples]
        groups = torch.arange(len(tasks)).repeat_interleave(self.config.sampling.n)
        valid = torch.tensor([s is not None for s in sections])

        streams = self._score(tasks, samples, sections)
        advantages = alignment_advantage(
            [(stream.weight, _spread(stream, valid)) for stream in streams.values()],
            groups,
            valid,
            format_penalty=self.config.format_penalty,
        )
        judged = self._update_judge(streams, groups[valid])
        policy = policy_update(self.policy, samples, advantages, clip_low=0.2, clip_high=0.2)
        self.sync(number + 1)
        return {
            **_means(streams, groups[valid]),
            **judged,
            "policy_loss": policy["policy_loss"],
            "policy_grad_norm": policy["grad_norm"],
            "logprob_mismatch": policy["logprob_mismatch"],
            "format_rate": float(valid.float().mean()),
            "response_tokens": sum(len(r.ids) for _, r in samples) / len(samples),
            "weight_version": self.engine.weight_version,
        }

    def sync(self, version: int) -> None:
        """Give the engine the policy's weights; it must answer with the version."""
        self.engine.sync(version)

    def _sections(self, rollout: Rollout) -> Sections | None:
        if rollout.finish_reason != "stop":
            return None
        return split_sections(response_text(rollout.ids, self.table, (self.reader.encoder.end_id,)))

    def _score(
        self,
        tasks: list[Task],
        samples: list[tuple[Prompt, Rollout]],
        sections: list[Sections | None],
    ) -> dict[str, Stream]:
        """All streams in one packed pass of the discriminator. An image is encoded once for the
        sequences of a micro-batch that show it."""
        students = [
            self.reader.read(prompt, found)
            for (prompt, _), found in zip(samples, sections, strict=True)
            if found is not None
        ]
        streams = {
            name: Stream(
                getattr(self.config, f"{name}_weight"),
                [t.teacher[name] for t in tasks],
                [student[name] for student in students],
            )
            for name in self.reader.streams
        }
        everything = [sequence for stream in streams.values() for sequence in stream.sequences]
        scores = discriminator.score(self.judge, everything).chunk(len(streams))
        for stream, own in zip(streams.values(), scores, strict=True):
            stream.scores = own
        return streams

    def _update_judge(self, streams: dict[str, Stream], groups: Tensor) -> Metrics:
        """Teacher above student for every valid response; groups [valid] says whose teacher."""
        if not len(groups):
            return {"discriminator_loss": 0.0, "discriminator_accuracy": 0.0, "aux_loss": 0.0,
                    "discriminator_grad_norm": 0.0}  # fmt: skip
        count = len(groups)

        def objective(scores: Tensor) -> Tensor:
            loss = self.config.score_reg_coef * score_regulariser(scores, scores.numel())
            for own in scores.chunk(len(streams)):
                teacher, student = own[:-count], own[-count:]
                loss = loss + bradley_terry_loss(teacher[groups], student, num_pairs=count)[0]
            return loss

        sequences = [sequence for stream in streams.values() for sequence in stream.sequences]
        scores = torch.cat([stream.scores for stream in streams.values()])
        result = discriminator.update(self.judge, sequences, scores, objective)
        accuracy = {f"{name}_accuracy": _accuracy(s, groups) for name, s in streams.items()}
        return {
            "discriminator_loss": float(objective(scores)),
            "discriminator_accuracy": sum(accuracy.values()) / len(accuracy),
            **accuracy,
            "discriminator_grad_norm": result.grad_norm,
            **result.sums,
        }


def _spread(stream: Stream, valid: Tensor) -> Tensor:
    """Scores of the valid responses at their places among all, 0 elsewhere."""
    out = torch.zeros(len(valid))
    out[valid] = stream.scores[len(stream.teacher) :]
    return out


def _accuracy(stream: Stream, groups: Tensor) -> float:
    """How often the teacher's section scores above the response's."""
    teachers = [stream.teacher[group] for group in groups.tolist()]
    teacher, student = stream.scores.split([len(stream.teacher), len(stream.student)])
    return discriminator.accuracy(teachers, stream.student, teacher[groups] - student)


def _means(streams: dict[str, Stream], groups: Tensor) -> Metrics:
    """Mean scores of both sides, and how far the teacher is above on average."""
    means: Metrics = {}
    gaps = []
    for name, stream in streams.items():
        teacher, student = stream.scores.split([len(stream.teacher), len(stream.student)])
        means[f"teacher_{name}_score"] = float(teacher.mean())
        means[f"student_{name}_score"] = float(student.mean()) if len(student) else 0.0
        means[f"reward_{name}"] = means[f"student_{name}_score"]
        gaps.append((teacher[groups] - student).mean() if len(student) else torch.zeros(()))
    return means | {"score_gap": float(torch.stack(gaps).mean())}
