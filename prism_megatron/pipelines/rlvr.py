"""Stage 3, reinforcement learning with verifiable rewards (GRPO, DAPO, GSPO, Dr. GRPO, CISPO).

prompts x n --> rollout engine --> responses --> 0.8 accuracy + 0.2 format
    --> groups that teach something --> advantage within each prompt's group
    --> clipped policy updates, held near the frozen start weights if asked --> weight sync
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from checkpoint_tools.headers import hf_directory
from prism_megatron.config import schema
from prism_megatron.data.prompts import PromptEncoder
from prism_megatron.data.rows import PromptRow, read_prompts
from prism_megatron.data.sources import find_row, open_sources
from prism_megatron.data.stream import BatchStream
from prism_megatron.objectives.advantages import group_normalise, overlong_penalty
from prism_megatron.objectives.rewards.scorer import Scorer, failure_counts
from prism_megatron.objectives.rewards.types import RewardItem
from prism_megatron.phases import phase
from prism_megatron.rollout import fleet
from prism_megatron.rollout.fleet import share_out
from prism_megatron.rollout.rewards import reward_item
from prism_megatron.rollout.sampler import Sampler, cache_shares, stale_share
from prism_megatron.rollout.validation import Validator
from prism_megatron.training.dynamic_sampling import Batch, DynamicSampler, Group
from prism_megatron.training.loop import Metrics, TrainingLoop
from prism_megatron.training.policy import policy_update
from prism_megatron.training.runner import ModelRunner
from prism_megatron.training.samples import write_samples
from prism_megatron.training.setup import build_encoder, build_policy, open_quarantine, start
from prism_megatron.types import Prompt, Rollout


@dataclass(frozen=True)
class Task:
    """A prompt whose answer can be checked."""

    prompt: Prompt
    row: PromptRow


def run(config: schema.RLVR) -> None:
    """Train config.policy for train.steps steps and export it to run.dir/hf."""
    backend = start(config)
    encoder = build_encoder(config.policy.path, config.data)
    quarantine = open_quarantine(config.run, config.data)

    def task(row: PromptRow) -> Task:
        return Task(encoder.encode_prompt(row), row)

    sources = open_sources(config.data, read_prompts)
    stream = BatchStream(
        sources,
        task,
        quarantine,
        batch_size=config.gen_batch_size or config.prompts_per_step,
        seed=config.run.seed,
        num_workers=config.data.num_workers,
    )
    policy, reference = build_policy(config, backend, encoder.pad_id)
    engine = fleet.build(
        config.rollout,
        policy.model,
        hf_directory(config.policy.path),
        seed=config.run.seed,
        logs=config.run.dir / "engines",
        release=policy.release,
        routes=config.router_replay == "R3",
    )
    sampler = Sampler(stream, engine, config.sampling, config.rollout)
    trainer = Trainer(config, encoder, policy, reference, sampler)
    groups = DynamicSampler(
        sampler,
        trainer.reward,
        batch_size=config.prompts_per_step,
        filtered=config.dynamic_sampling,
        num_rows=sum(map(len, sources)),
        max_epochs=config.max_epochs,
        max_staleness=config.max_staleness,
        steps=config.train.steps,
    )

    def restore(found: dict[str, Any] | None, step: int) -> None:
        if found is None:
            groups.drop()
        else:
            groups.load_state_dict(found, lambda name: task(find_row(sources, name)))
        sampler.sync(step)

    loop = TrainingLoop(
        config,
        {"policy": (policy, config.policy.path)},
        stream,
        quarantine,
        shown="reward",
        carried=groups.state_dict,
        restore=restore,
        skipped=sampler.sync,
    )
    loop.resume()
    if loop.run(lambda: trainer.step(groups.next_batch(loop.step), loop.step)):
        loop.export("policy")


class Trainer:
    """The policy and what samples from it."""

    def __init__(
        self,
        config: schema.RLVR,
        encoder: PromptEncoder,
        policy: ModelRunner,
        reference: ModelRunner | None,
        sampler: Sampler[Task],
    ) -> None:
        self.config, self.encoder = config, encoder
        self.policy, self.reference, self.sampler = policy, reference, sampler
        self.scorer = Scorer(config.rewards)
        self.validator = Validator(config, encoder, sampler.engine, self.scorer)

    @phase("score")
    def reward(self, answered: list[tuple[Task, list[Rollout]]]) -> list[Group[Task]]:
        """Tasks and their responses, rewarded."""
        n = self.config.sampling.n
        items = [self._item(task, rollout) for task, group in answered for rollout in group]
        rewards = share_out(items, self.scorer.score)
        return [
            Group(task, group, rewards[i * n : i * n + n])
            for i, (task, group) in enumerate(answered)
        ]

    def step(self, batch: Batch[Task], number: int) -> Metrics:
        """Train on the batch's groups, hand the weights to the engine."""
        config, slept = self.config, self.sampler.engine.sleep()
        groups = torch.arange(len(batch.groups)).repeat_interleave(config.sampling.n)
        rewards = torch.cat([self._totals(group) for group in batch.groups])
        samples = [(g.task.prompt, rollout) for g in batch.groups for rollout in g.rollouts]
        advantages = group_normalise(rewards, groups, by_std=config.norm_adv_by_std)
        if config.samples_every and (number + 1) % config.samples_every == 0:
            self._record(batch.groups, samples, rewards, advantages, number + 1)
        policy = policy_update(
            self.policy,
            samples,
            advantages,
            config,
            max_tokens=config.sampling.max_new_tokens,
            reference=self.reference,
        )
        synced = self.sampler.sync(number + 1)
        return {
            **(self._means(batch.sampled) if batch.sampled else {}),
            **policy,
            "sampled_prompts": len(batch.sampled),
            "expired_prompts": batch.expired,
            "stale_share": stale_share([rollout for _, rollout in samples], number),
            **cache_shares(samples, self.policy.model.architecture.image_token_id),
            "weight_version": self.sampler.engine.weight_version,
            "engine_restarts": self.sampler.engine.restarts,
            "sync_s": synced["total"],
            **slept,
            **self.validator.metrics(number + 1),
        }

    def _record(
        self,
        groups: list[Group[Task]],
        samples: list[tuple[Prompt, Rollout]],
        totals: Tensor,
        advantages: Tensor,
        step: int,
    ) -> None:
        rewards = [reward for group in groups for reward in group.rewards]
        judged = {
            "reward": totals.tolist(),
            **{
                name: [getattr(r, name) for r in rewards] for name in ("accuracy", "format", "rule")
            },
        }
        folder = self.config.run.dir / "samples"
        write_samples(folder, step, self.encoder, samples, advantages, judged)

    def _item(self, task: Task, rollout: Rollout) -> RewardItem:
        text = self.encoder.decode(rollout.ids, self.config.rewards.rules)
        return reward_item(task.row, text, finished=rollout.finish_reason == "stop")

    def _totals(self, group: Group[Task]) -> Tensor:
        """Rewards of the group's responses, less what long ones lose, [n]."""
        totals = torch.tensor([reward.total for reward in group.rewards])
        config = self.config
        if not config.overlong_buffer:
            return totals
        return totals + overlong_penalty(
            torch.tensor([len(rollout.ids) for rollout in group.rollouts]),
            config.sampling.max_new_tokens,
            config.overlong_buffer,
            config.overlong_penalty,
        )

    def _means(self, sampled: list[Group[Task]]) -> Metrics:
        """Of all responses that were sampled, those of groups that are not trained on included."""
        rewards = [reward for group in sampled for reward in group.rewards]
        lengths = [len(rollout.ids) for group in sampled for rollout in group.rollouts]
        return {
            "reward": float(torch.cat([self._totals(group) for group in sampled]).mean()),
            "accuracy": sum(reward.accuracy for reward in rewards) / len(rewards),
            "format_rate": sum(reward.format for reward in rewards) / len(rewards),
            **failure_counts(rewards),
            "response_tokens": sum(lengths) / len(lengths),
            "differing_share": sum(group.differs for group in sampled) / len(sampled),
        }
