"""Stage 2, adversarial alignment: the policy learns to answer so that the discriminator can't tell
its captions and its reasoning from the teacher's, and the discriminator learns to tell.

    prompts x n ----> rollout engine (weights of version k) ----> responses
                                                                    |  split into sections
    teacher caption, teacher reasoning ----+                        v
                                           +--> discriminator --> scores a section
                                                     |              |
        update: teacher above student  <-------------+              v
        (Bradley-Terry + load balance,        group-normalise each stream, combine -> advantages
         n times a step)                                            |
    rollout engine (version k + 1) <---- weight sync <---- policy update (paper: no KL)
"""

from __future__ import annotations

from collections.abc import Sequence as Ordered
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from checkpoint_tools.megatron_directory import hf_directory
from prism_megatron.config import schema
from prism_megatron.data.packing import plan_micro_batches
from prism_megatron.data.prompts import PromptEncoder
from prism_megatron.data.rows import TEACHER_SECTIONS, PromptRow, RowError, read_prompts
from prism_megatron.data.sources import find_row, open_sources
from prism_megatron.data.stream import BatchStream
from prism_megatron.objectives.advantages import alignment_advantage
from prism_megatron.objectives.losses import (
    bound_scores,
    bradley_terry_loss,
    local_pair_weights,
    score_regulariser,
)
from prism_megatron.objectives.rewards.scorer import Scorer
from prism_megatron.objectives.sections import (
    Sections,
    response_text,
    sections_of,
    split_sections,
    token_bytes,
)
from prism_megatron.rollout import fleet
from prism_megatron.rollout.fleet import share_out
from prism_megatron.rollout.rewards import reward_item
from prism_megatron.rollout.sampler import Sampler, stale_share
from prism_megatron.training import discriminator
from prism_megatron.training.alarms import Alarms
from prism_megatron.training.loop import Metrics, TrainingLoop
from prism_megatron.training.policy import policy_update
from prism_megatron.training.runner import ModelRunner
from prism_megatron.training.setup import (
    build_encoder,
    build_policy,
    build_runner,
    open_quarantine,
    start,
)
from prism_megatron.types import Prompt, Rollout, Sequence


@dataclass(frozen=True)
class Task:
    """A prompt, its row, and the teacher's answer to it, one sequence for each stream."""

    prompt: Prompt
    teacher: dict[str, Sequence]
    row: PromptRow


def run(config: schema.Align) -> None:
    """Play the game for train.steps steps and export the policy to run.dir/hf."""
    backend = start(config.backend, config.policy, config.discriminator)
    encoder = build_encoder(config.policy.path, config.data)
    reader = discriminator.Reader(
        encoder,
        config.discriminator,
        teacher_length=config.teacher_length,
        section_ends=config.section_ends,
    )
    quarantine = open_quarantine(config.run, config.data)
    sources = open_sources(config.data, partial(read_prompts, required=TEACHER_SECTIONS))
    stream = BatchStream(
        sources,
        lambda row: task(encoder, reader, row),
        quarantine,
        batch_size=config.prompts_per_step,
        seed=config.run.seed,
        num_workers=config.data.num_workers,
    )
    policy, frozen = build_policy(config, backend, encoder.pad_id)
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
        updates_per_step=config.discriminator_updates,
        mrope=config.positions == "corrected",
    )
    models = {
        "policy": (policy, config.policy.path),
        "discriminator": (judge, config.discriminator.path),
    }

    def release() -> None:
        policy.release()
        judge.release()

    engine = fleet.build(
        config.rollout,
        policy.model,
        hf_directory(config.policy.path),
        seed=config.run.seed,
        logs=config.run.dir / "engines",
        release=release,
        routes=config.router_replay == "R3",
    )
    sampler = Sampler(stream, engine, config.sampling, config.rollout)
    loop = TrainingLoop(
        config, models, stream, quarantine, shown="score_gap", carried=sampler.state_dict
    )
    done = loop.resume()
    if loop.found:
        sampler.load_state_dict(
            loop.found, lambda name: task(encoder, reader, find_row(sources, name))
        )
    game = Game(config, reader, policy, frozen, judge, sampler)
    sampler.sync(done)
    if loop.run(lambda: game.step(loop.step)):
        loop.export("policy")


def task(encoder: PromptEncoder, reader: discriminator.Reader, row: PromptRow) -> Task:
    """RowError if the teacher's answer itself has not the format that the student must learn."""
    teacher = sections_of(row.teacher_caption or "", row.teacher_cot or "")
    if teacher is None:
        raise RowError("teacher_caption and teacher_cot do not make up a well-formed response")
    prompt = encoder.encode_prompt(row)
    return Task(prompt, reader.read(prompt, teacher, teacher=True), row)


@dataclass
class Stream:
    """One part of the judgement, such as captions or reasoning, over the whole step.

    Sequences and scores: the teacher's, one a prompt, then those of the valid responses. Scores are
    the head's, without bound.
    """

    weight: float
    teacher: list[Sequence]
    student: list[Sequence]
    scores: Tensor = field(default_factory=lambda: torch.zeros(0))

    @property
    def sequences(self) -> list[Sequence]:
        return [*self.teacher, *self.student]


class Game:
    """The two players, and what samples from the policy."""

    def __init__(
        self,
        config: schema.Align,
        reader: discriminator.Reader,
        policy: ModelRunner,
        frozen: ModelRunner | None,
        judge: ModelRunner,
        sampler: Sampler[Task],
    ) -> None:
        self.config, self.reader = config, reader
        self.policy, self.frozen, self.judge, self.sampler = policy, frozen, judge, sampler
        self.alarms = Alarms(config.alarms)
        self.table = token_bytes(reader.encoder.tokenizer)
        judges_answers = config.advantage_mode != "default"
        self.scorer = Scorer(config.rewards) if judges_answers else None

    def step(self, number: int) -> Metrics:
        """Sample, judge, train the judge, train the policy, hand its weights to the engine."""
        config = self.config
        answered = self.sampler.next(number, is_last=number + 1 == config.train.steps)
        slept = self.sampler.engine.sleep()
        tasks = [task for task, _ in answered]
        samples = [(task.prompt, rollout) for task, group in answered for rollout in group]
        sections = [self._sections(rollout) for _, rollout in samples]
        groups = torch.arange(len(tasks)).repeat_interleave(config.sampling.n)
        valid = torch.tensor([s is not None for s in sections])
        accuracy = self._accuracy(tasks, samples)

        streams = self._score(tasks, samples, sections)
        advantages = alignment_advantage(
            [(stream.weight, self._rewards(stream, valid)) for stream in streams.values()],
            groups,
            valid,
            options=config,
            accuracy=accuracy,
        )
        weights = self._pair_weights(samples, valid)
        judged = self._update_judge(streams, groups[valid], weights, number)
        policy = policy_update(
            self.policy,
            samples,
            advantages,
            config,
            max_tokens=config.sampling.max_new_tokens,
            reference=self.frozen,
        )
        synced = self.sampler.sync(number + 1)
        metrics = {
            **self._means(streams, groups, valid),
            **judged,
            "policy_grad_norm": policy.pop("grad_norm"),
            **policy,
            "format_rate": float(valid.float().mean()),
            **({} if accuracy is None else {"accuracy": float(accuracy.mean())}),
            "response_tokens": sum(len(r.ids) for _, r in samples) / len(samples),
            "stale_share": stale_share([rollout for _, rollout in samples], number),
            "weight_version": self.sampler.engine.weight_version,
            "sync_s": synced["total"],
            **slept,
        }
        return metrics | self.alarms.check(metrics, number + 1)

    def _sections(self, rollout: Rollout) -> Sections | None:
        if rollout.finish_reason != "stop":
            return None
        return split_sections(self._text(rollout))

    def _text(self, rollout: Rollout) -> str:
        return response_text(rollout.ids, self.table, (self.reader.encoder.end_id,))

    def _accuracy(self, tasks: list[Task], samples: list[tuple[Prompt, Rollout]]) -> Tensor | None:
        """Whether each response's answer is right, [B], if advantage_mode asks for it; 0 for an
        ill-formed one."""
        if self.scorer is None:
            return None
        rows = [task.row for task in tasks for _ in range(self.config.sampling.n)]
        items = [
            reward_item(row, self._text(rollout), finished=rollout.finish_reason == "stop")
            for row, (_, rollout) in zip(rows, samples, strict=True)
        ]
        return torch.tensor([r.accuracy for r in share_out(items, self.scorer.score)])

    def _score(
        self,
        tasks: list[Task],
        samples: list[tuple[Prompt, Rollout]],
        sections: list[Sections | None],
    ) -> dict[str, Stream]:
        """All streams in one packed pass of the discriminator. An image is encoded once for the
        sequences of a micro-batch that show it."""
        students = [
            self.reader.read(prompt, found, teacher=False)
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
        scores = discriminator.score(self.judge, _sequences(streams)).chunk(len(streams))
        for stream, own in zip(streams.values(), scores, strict=True):
            stream.scores = own
        return streams

    def _bounded(self, scores: Tensor) -> Tensor:
        section = self.config.discriminator
        return bound_scores(scores, section.score_bound, section.score_limit)

    def _rewards(self, stream: Stream, valid: Tensor) -> Tensor:
        """What the policy gets for each response, [B]: its score, less what long ones lose; 0 where
        invalid."""
        lengths = torch.tensor([float(s.response_mask.sum()) for s in stream.student])
        student = self._bounded(stream.scores[len(stream.teacher) :])
        out = torch.zeros(len(valid))
        out[valid] = student - self.config.score_length_correction_beta * lengths.log1p()
        return out

    def _pair_weights(self, samples: list[tuple[Prompt, Rollout]], valid: Tensor) -> Tensor | None:
        """With pair_counts=reference, what each valid response's pair counts, by the micro-batches
        that the responses as a whole would make."""
        if self.config.pair_counts == "corrected":
            return None
        plan = plan_micro_batches(
            [len(prompt.input_ids) + len(rollout.ids) for prompt, rollout in samples],
            dp_size=self.judge.parallel.data_size,
            max_tokens=self.judge.micro_batch_tokens,
        )
        return local_pair_weights([m for rank in plan for m in rank if m], valid)[valid]

    def _update_judge(
        self,
        streams: dict[str, Stream],
        groups: Tensor,
        weights: Tensor | None,
        number: int,
    ) -> Metrics:
        """Teacher above student for every valid response; groups [valid] says whose teacher,
        weights [valid] what it counts beside 1.

        Metrics are of the scores that the policy is trained with, before the first update; nothing
        without a valid response.
        """
        if not len(groups):
            return {}
        config, sequences = self.config, _sequences(streams)
        scores = torch.cat([stream.scores for stream in streams.values()])
        noisy: list[Sequence] = []
        if config.gradient_penalty_coef:
            teachers = [sequence for stream in streams.values() for sequence in stream.teacher]
            noisy = discriminator.noisy(teachers, config.gradient_penalty_std, number)
            scores = torch.cat([scores, discriminator.score(self.judge, noisy)])

        def objective(scores: Tensor) -> Tensor:
            scores, disturbed = self._bounded(scores).split([len(sequences), len(noisy)])
            return self._loss(scores.chunk(len(streams)), disturbed, groups, weights)

        metrics = self._accuracies(streams, groups)
        metrics["discriminator_loss"] = float(objective(scores))
        for update in range(config.discriminator_updates):
            if update:
                scores = discriminator.score(self.judge, [*sequences, *noisy])
            result = discriminator.update(self.judge, [*sequences, *noisy], scores, objective)
        return metrics | {"discriminator_grad_norm": result.grad_norm, **result.sums}

    def _loss(
        self, streams: Ordered[Tensor], noisy: Tensor, groups: Tensor, weights: Tensor | None
    ) -> Tensor:
        """The discriminator's, of each stream's scores (teachers, then valid students) and, with a
        gradient penalty, the scores of all teachers under noise."""
        config, count = self.config, len(groups)
        scores = torch.cat([*streams])
        loss = config.score_reg_coef * score_regulariser(scores, scores.numel())
        for own in streams:
            teacher, student = own[:-count], own[-count:]
            loss = loss + bradley_terry_loss(teacher[groups], student, count, weights)[0]
        if config.gradient_penalty_coef:
            change = noisy - torch.cat([own[:-count] for own in streams])
            loss = loss + config.gradient_penalty_coef * change.square().mean()
        return loss

    def _accuracies(self, streams: dict[str, Stream], groups: Tensor) -> Metrics:
        """How often each teacher's section scores above the response's."""
        found = {}
        for name, stream in streams.items():
            teachers = [stream.teacher[group] for group in groups.tolist()]
            teacher, student = self._bounded(stream.scores).split(
                [len(stream.teacher), len(stream.student)]
            )
            gaps = teacher[groups] - student
            found[f"{name}_accuracy"] = discriminator.accuracy(teachers, stream.student, gaps)
        return {"discriminator_accuracy": sum(found.values()) / len(found), **found}

    def _means(self, streams: dict[str, Stream], groups: Tensor, valid: Tensor) -> Metrics:
        """Mean scores of both sides, and how far the teacher is above on average; what needs a
        valid response only where there is one."""
        means: Metrics = {}
        gaps = []
        for name, stream in streams.items():
            teacher, student = self._bounded(stream.scores).split(
                [len(stream.teacher), len(stream.student)]
            )
            means[f"teacher_{name}_score"] = float(teacher.mean())
            if len(student):
                means[f"student_{name}_score"] = float(student.mean())
                means[f"reward_{name}"] = float(self._rewards(stream, valid)[valid].mean())
                gaps.append((teacher[groups[valid]] - student).mean())
        return means | ({"score_gap": float(torch.stack(gaps).mean())} if gaps else {})


def _sequences(streams: dict[str, Stream]) -> list[Sequence]:
    """What the discriminator reads in a step, stream after stream."""
    return [sequence for stream in streams.values() for sequence in stream.sequences]
