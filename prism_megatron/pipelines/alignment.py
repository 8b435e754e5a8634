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
from typing import Any

import torch
from torch import Tensor

from checkpoint_tools.headers import hf_directory
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
    fallback_loss,
    local_pair_weights,
    score_regulariser,
)
from prism_megatron.objectives.rewards.scorer import Scorer
from prism_megatron.objectives.sections import (
    CONTROL_TOKEN,
    Sections,
    caption_tokens,
    reference_sections,
    sections_of,
    split_sections,
)
from prism_megatron.rollout import fleet
from prism_megatron.rollout.fleet import share_out
from prism_megatron.rollout.rewards import reward_item
from prism_megatron.rollout.sampler import Sampler, cache_shares, stale_share
from prism_megatron.rollout.validation import Validator
from prism_megatron.training import discriminator
from prism_megatron.training.alarms import Alarms
from prism_megatron.training.loop import Metrics, TrainingLoop
from prism_megatron.training.policy import policy_update
from prism_megatron.training.runner import ModelRunner
from prism_megatron.training.samples import write_samples
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
    discriminator.check_shown(config.discriminator)
    backend = start(config)
    encoder = build_encoder(config.policy.path, config.data)
    reader = discriminator.Reader(
        encoder,
        config.discriminator,
        teacher_length=config.teacher_length,
        section_ends=config.section_ends,
        sampled_tokens=config.train.micro_batch_tokens,
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
    game = Game(config, reader, policy, frozen, judge, sampler)

    def restore(found: dict[str, Any] | None, step: int) -> None:
        if found is None:
            sampler.drop()
        else:
            game.alarms.steps |= found["alarms"]
            sampler.load_state_dict(
                found, lambda name: task(encoder, reader, find_row(sources, name))
            )
        sampler.sync(step)

    loop = TrainingLoop(
        config,
        models,
        stream,
        quarantine,
        shown="score_gap",
        carried=game.state_dict,
        restore=restore,
        skipped=sampler.sync,
    )
    loop.resume()
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

    Sequences and scores: the teacher's, one a prompt, then those of the valid responses, then, with
    regularised_scores=reference, those of the invalid ones. Scores are the head's, without bound.
    """

    weight: float
    teacher: list[Sequence]
    student: list[Sequence]
    invalid: list[Sequence]
    scores: Tensor = field(default_factory=lambda: torch.zeros(0))

    @property
    def sequences(self) -> list[Sequence]:
        return [*self.teacher, *self.student, *self.invalid]

    def split(self, scores: Tensor) -> tuple[Tensor, ...]:
        """Scores of all its sequences -> the teacher's, valid responses', invalid ones'."""
        return scores.split([len(self.teacher), len(self.student), len(self.invalid)])


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
        # its processes start when there is something to compare
        self.scorer = Scorer(config.rewards)
        self.validator = Validator(config, reader.encoder, sampler.engine, self.scorer)

    def step(self, number: int) -> Metrics:
        """Sample, judge, train the judge, train the policy, hand its weights to the engine."""
        config = self.config
        answered = self.sampler.next(number, is_last=number + 1 == config.train.steps)
        slept = self.sampler.engine.sleep()
        tasks = [task for task, _ in answered]
        samples = [(task.prompt, rollout) for task, group in answered for rollout in group]
        read = [self._read(prompt, rollout) for prompt, rollout in samples]
        groups = torch.arange(len(tasks)).repeat_interleave(config.sampling.n)
        valid = torch.tensor([sequences is not None for sequences in read])
        accuracy = self._accuracy(tasks, samples)

        streams = self._score(tasks, samples, read)
        advantages = alignment_advantage(
            [(stream.weight, self._rewards(stream, valid)) for stream in streams.values()],
            groups,
            valid,
            options=config,
            accuracy=accuracy,
        )
        if config.samples_every and (number + 1) % config.samples_every == 0:
            judgement = self._judgement(streams, groups, valid, accuracy)
            folder, encoder = config.run.dir / "samples", self.reader.encoder
            write_samples(folder, number + 1, encoder, samples, advantages, judgement)
        judged = self._update_judge(streams, groups, valid, self._micro_batches(samples), number)
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
            **cache_shares(samples, self.policy.model.architecture.image_token_id),
            "weight_version": self.sampler.engine.weight_version,
            "engine_restarts": self.sampler.engine.restarts,
            "sync_s": synced["total"],
            **slept,
            **self.validator.metrics(number + 1),
        }
        return metrics | self.alarms.check(metrics, number + 1)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds beside the models, as JSON."""
        return self.sampler.state_dict() | {"alarms": self.alarms.steps}

    def _sections(self, rollout: Rollout) -> Sections | None:
        text = self.reader.encoder.decode(rollout.ids, self.config.response_format)
        if self.config.response_format == "reference":
            # what spells a control token can't be tokenised anew
            return None if CONTROL_TOKEN.search(text) else reference_sections(text)
        if rollout.finish_reason != "stop":
            return None
        return split_sections(text)

    def _accuracy(self, tasks: list[Task], samples: list[tuple[Prompt, Rollout]]) -> Tensor | None:
        """Whether each response's answer is right, [B], if advantage_mode asks for it; 0 for an
        ill-formed one."""
        if self.config.advantage_mode == "default":
            return None
        rows = [task.row for task in tasks for _ in range(self.config.sampling.n)]
        decode, rules = self.reader.encoder.decode, self.config.rewards.rules
        items = [
            reward_item(row, decode(rollout.ids, rules), finished=rollout.finish_reason == "stop")
            for row, (_, rollout) in zip(rows, samples, strict=True)
        ]
        return torch.tensor([r.accuracy for r in share_out(items, self.scorer.score)])

    def _score(
        self,
        tasks: list[Task],
        samples: list[tuple[Prompt, Rollout]],
        read: list[dict[str, Sequence] | None],
    ) -> dict[str, Stream]:
        """All streams in one packed pass of the discriminator; read: what _read gives for each
        sample. An image is encoded once for the sequences of a micro-batch that show it."""
        invalid = []
        if self.config.regularised_scores == "reference":
            invalid = [
                # halves of its tokens, for want of sections
                self.reader.read_sampled(prompt, rollout.ids, max(1, len(rollout.ids) // 2))
                for (prompt, rollout), found in zip(samples, read, strict=True)
                if found is None
            ]
        streams = {
            name: Stream(
                getattr(self.config, f"{name}_weight"),
                [t.teacher[name] for t in tasks],
                [response[name] for response in read if response is not None],
                [response[name] for response in invalid],
            )
            for name in self.reader.streams
        }
        scores = discriminator.score(self.judge, _sequences(streams)).chunk(len(streams))
        for stream, own in zip(streams.values(), scores, strict=True):
            stream.scores = own
        return streams

    def _read(self, prompt: Prompt, rollout: Rollout) -> dict[str, Sequence] | None:
        """What the discriminator reads of a valid response; None of an invalid one."""
        found = self._sections(rollout)
        if found is None:
            return None
        if self.config.student_tokens == "corrected":
            try:
                return self.reader.read(prompt, found, teacher=False)
            except RowError:
                # it spells a control token of this tokenizer that does not look like Qwen's
                return None
        encoder = self.reader.encoder
        hidden = encoder.hidden_ids(self.config.response_format)
        count = caption_tokens(rollout.ids, encoder.token_bytes, found.caption, hidden)
        return self.reader.read_sampled(prompt, rollout.ids, count)

    def _bounded(self, scores: Tensor) -> Tensor:
        section = self.config.discriminator
        return bound_scores(scores, section.score_bound, section.score_limit)

    def _rewards(self, stream: Stream, valid: Tensor) -> Tensor:
        """What the policy gets for each response, [B]: its score, less what long ones lose; 0 where
        invalid."""
        lengths = torch.tensor([float(s.response_mask.sum()) for s in stream.student])
        _, student, _ = stream.split(self._bounded(stream.scores))
        out = torch.zeros(len(valid))
        out[valid] = student - self.config.score_length_correction_beta * lengths.log1p()
        return out

    def _micro_batches(self, samples: list[tuple[Prompt, Rollout]]) -> list[list[list[int]]]:
        """The micro-batches that the responses as a whole would make, by which the reference counts
        pairs; see plan_micro_batches. Empty if nothing is counted so."""
        if "reference" not in (self.config.pair_counts, self.config.fallback_loss):
            return []
        return plan_micro_batches(
            [len(prompt.input_ids) + len(rollout.ids) for prompt, rollout in samples],
            dp_size=self.judge.parallel.data_size,
            max_tokens=self.judge.micro_batch_tokens,
        )

    def _update_judge(
        self,
        streams: dict[str, Stream],
        groups: Tensor,
        valid: Tensor,
        plan: list[list[list[int]]],
        number: int,
    ) -> Metrics:
        """Teacher above student for every valid response; groups [B] says whose teacher, valid [B]
        which responses are, plan see _micro_batches.

        Metrics are of the scores that the policy is trained with, before the first update; the
        accuracies need a valid response, and so does the update, but for the fallback loss.
        """
        config = self.config
        if not valid.any() and config.fallback_loss == "corrected":
            return {}
        scores = torch.cat([stream.scores for stream in streams.values()])
        count, loads = len(scores), self.judge.loads

        def objective(scores: Tensor) -> Tensor:
            scores, noisy = self._bounded(scores).split([count, len(scores) - count])
            parts = [
                stream.split(own)
                for stream, own in zip(streams.values(), scores.chunk(len(streams)), strict=True)
            ]
            return self._loss(parts, noisy, groups, valid, plan)

        metrics = self._accuracies(streams, groups[valid]) if valid.any() else {}
        has_dropout = config.discriminator.score_dropout == "reference"
        for update in range(config.discriminator_updates):
            shown = self._shown(streams, number, update)
            if update or has_dropout:
                scores = discriminator.score(self.judge, shown)
                loads = self.judge.loads
            elif len(shown) > count:
                scores = torch.cat([scores, discriminator.score(self.judge, shown[count:])])
                loads = loads + self.judge.loads
            if not update:
                metrics["discriminator_loss"] = float(objective(scores))
            result = discriminator.update(self.judge, shown, scores, loads, objective)
        return metrics | {"discriminator_grad_norm": result.grad_norm, **result.sums}

    def _shown(self, streams: dict[str, Stream], number: int, update: int) -> list[Sequence]:
        """What the discriminator is trained on in one of its updates of the step: the sequences of
        all streams and, with a gradient penalty, the teachers' once more under noise."""
        config, sequences = self.config, _sequences(streams)
        if config.discriminator.score_dropout == "reference":
            draw = number * config.discriminator_updates + update
            sequences = discriminator.dropped_out(sequences, draw)
        if not config.gradient_penalty_coef:
            return sequences
        teachers: list[Sequence] = []
        first = 0
        for stream in streams.values():
            teachers += sequences[first : first + len(stream.teacher)]
            first += len(stream.sequences)
        return sequences + discriminator.noisy(teachers, config.gradient_penalty_std, number)

    def _loss(
        self,
        streams: Ordered[tuple[Tensor, ...]],
        noisy: Tensor,
        groups: Tensor,
        valid: Tensor,
        plan: list[list[list[int]]],
    ) -> Tensor:
        """The discriminator's, of each stream's scores (see Stream.split) and, with a gradient
        penalty, the scores of all teachers under noise."""
        config = self.config
        weights = None
        if config.pair_counts == "reference":
            weights = local_pair_weights([m for rank in plan for m in rank if m], valid)[valid]
        regularised: list[Tensor] = []
        loss = torch.zeros(())
        for teacher, student, invalid in streams:
            if len(student):
                pairs = teacher[groups[valid]], student
                loss = loss + bradley_terry_loss(*pairs, len(student), weights)[0]
            if config.fallback_loss == "reference":
                loss = loss + fallback_loss(teacher[groups], plan, valid)
            is_reference = config.regularised_scores == "reference"
            regularised += [teacher[groups] if is_reference else teacher, student, invalid]
        scores = torch.cat(regularised)
        loss = loss + config.score_reg_coef * score_regulariser(scores, scores.numel())
        if config.gradient_penalty_coef:
            change = noisy - torch.cat([teacher for teacher, *_ in streams])
            loss = loss + config.gradient_penalty_coef * change.square().mean()
        return loss

    def _accuracies(self, streams: dict[str, Stream], groups: Tensor) -> Metrics:
        """How often each teacher's section scores above the response's; groups [valid]."""
        found = {}
        for name, stream in streams.items():
            teachers = [stream.teacher[group] for group in groups.tolist()]
            teacher, student, _ = stream.split(self._bounded(stream.scores))
            gaps = teacher[groups] - student
            found[f"{name}_accuracy"] = discriminator.accuracy(teachers, stream.student, gaps)
        return {"discriminator_accuracy": sum(found.values()) / len(found), **found}

    def _judgement(
        self,
        streams: dict[str, Stream],
        groups: Tensor,
        valid: Tensor,
        accuracy: Tensor | None,
    ) -> dict[str, list[Any]]:
        """What a record says of each response, [B]: whether it is valid, its scores and those of
        its teacher, None of an invalid one."""
        judgement: dict[str, list[Any]] = {"valid": valid.tolist()}
        if accuracy is not None:
            judgement["accuracy"] = accuracy.tolist()
        for name, stream in streams.items():
            teacher, student, _ = stream.split(self._bounded(stream.scores))
            found = iter(student.tolist())
            judgement[f"{name}_score"] = [next(found) if v else None for v in valid]
            judgement[f"teacher_{name}_score"] = teacher[groups].tolist()
        return judgement

    def _means(self, streams: dict[str, Stream], groups: Tensor, valid: Tensor) -> Metrics:
        """Mean scores of both sides, and how far the teacher is above on average; what needs a
        valid response only where there is one."""
        means: Metrics = {}
        gaps = []
        for name, stream in streams.items():
            teacher, student, _ = stream.split(self._bounded(stream.scores))
            means[f"teacher_{name}_score"] = float(teacher.mean())
            if len(student):
                means[f"student_{name}_score"] = float(student.mean())
                means[f"reward_{name}"] = float(self._rewards(stream, valid)[valid].mean())
                gaps.append((teacher[groups[valid]] - student).mean())
        return means | ({"score_gap": float(torch.stack(gaps).mean())} if gaps else {})


def _sequences(streams: dict[str, Stream]) -> list[Sequence]:
    """What the discriminator reads in a step, stream after stream."""
    return [sequence for stream in streams.values() for sequence in stream.sequences]
