"""Stage 3, reinforcement learning with verifiable rewards (GRPO, DAPO, GSPO, Dr. GRPO, CISPO).

prompts x n --> rollout engine --> responses --> 0.8 accuracy + 0.2 format
    --> groups that teach something --> advantage within each prompt's group
    --> clipped policy updates, held near the frozen start weights if asked --> weight sync
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from checkpoint_tools.megatron_directory import hf_directory
from prism_megatron.config import schema
from prism_megatron.data.prompts import PromptEncoder
from prism_megatron.data.rows import PromptRow, read_prompts
from prism_megatron.data.sources import find_row, open_sources
from prism_megatron.data.stream import BatchStream
from prism_megatron.objectives.advantages import group_normalise, overlong_penalty
from prism_megatron.objectives.rewards.scorer import Scorer, failure_counts
from prism_megatron.objectives.rewards.types import RewardItem
from prism_megatron.objectives.sections import response_text, token_bytes
from prism_megatron.rollout import fleet
from prism_megatron.rollout.fleet import share_out
from prism_megatron.rollout.rewards import reward_item
from prism_megatron.training.dynamic_sampling import DynamicSampler, Group
from prism_megatron.training.loop import Metrics, TrainingLoop
from prism_megatron.training.policy import policy_update
from prism_megatron.training.runner import ModelRunner
from prism_megatron.training.setup import build_encoder, build_policy, open_quarantine, start
from prism_megatron.types import Prompt, Rollout


@dataclass(frozen=True)
class Task:
    """A prompt whose answer can be checked."""

    prompt: Prompt
    row: PromptRow


def run(config: schema.RLVR) -> None:
    """Train config.policy for train.steps steps and export it to run.dir/hf."""
    backend = start(config.backend, config.policy)
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
    )
    trainer = Trainer(config, encoder, policy, reference, engine)
    sampler = DynamicSampler(
        stream,
        trainer.sample,
        batch_size=config.prompts_per_step,
        filtered=config.dynamic_sampling,
        num_rows=sum(map(len, sources)),
        max_epochs=config.max_epochs,
    )
    loop = TrainingLoop(
        config,
        {"policy": (policy, config.policy.path)},
        stream,
        quarantine,
        shown="reward",
        carried=sampler.state_dict,
    )
    done = loop.resume()
    if loop.found:
        sampler.load_state_dict(loop.found, lambda name: task(find_row(sources, name)))
    engine.sync(done)
    if loop.run(lambda: trainer.step(*sampler.next_batch(loop.step), loop.step)):
        loop.export("policy")


class Trainer:
    """The policy and the engine that samples from it."""

    def __init__(
        self,
        config: schema.RLVR,
        encoder: PromptEncoder,
        policy: ModelRunner,
        reference: ModelRunner | None,
        engine: fleet.Fleet,
    ) -> None:
        self.config, self.encoder = config, encoder
        self.policy, self.reference, self.engine = policy, reference, engine
        self.table = token_bytes(encoder.tokenizer)
        self.scorer = Scorer(config.rewards)

    def sample(self, tasks: list[Task], number: int) -> list[Group[Task]]:
        """Responses to each task, rewarded."""
        n = self.config.sampling.n
        rollouts = self.engine.generate([t.prompt for t in tasks], self.config.sampling, number)
        items = [self._item(t, r) for t, group in zip(tasks, rollouts, strict=True) for r in group]
        rewards = share_out(items, self.scorer.score)
        return [
            Group(task, group, rewards[i * n : i * n + n])
            for i, (task, group) in enumerate(zip(tasks, rollouts, strict=True))
        ]

    def step(self, batch: list[Group[Task]], sampled: list[Group[Task]], number: int) -> Metrics:
        """Train on the batch's groups, hand the weights to the engine. sampled: all groups that
        were sampled for this step, which tell how good the policy is."""
        config, slept = self.config, self.engine.sleep()
        groups = torch.arange(len(batch)).repeat_interleave(config.sampling.n)
        rewards = torch.cat([self._totals(group) for group in batch])
        policy = policy_update(
            self.policy,
            [(group.task.prompt, rollout) for group in batch for rollout in group.rollouts],
            group_normalise(rewards, groups, by_std=config.norm_adv_by_std),
            config,
            max_tokens=config.sampling.max_new_tokens,
            reference=self.reference,
        )
        synced = self.engine.sync(number + 1)
        stale = [r.weight_version != number for group in batch for r in group.rollouts]
        return {
            **(self._means(sampled) if sampled else {}),
            **policy,
            "sampled_prompts": len(sampled),
            "stale_share": sum(stale) / len(stale),
            "weight_version": self.engine.weight_version,
            "sync_s": synced["total"],
            **slept,
        }

    def _item(self, task: Task, rollout: Rollout) -> RewardItem:
        text = response_text(rollout.ids, self.table, (self.encoder.end_id,))
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
