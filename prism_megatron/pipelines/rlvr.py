"""Stage 3, reinforcement learning with verifiable rewards (GRPO).

prompts x n --> rollout engine --> responses --> 0.8 accuracy + 0.2 format
    --> advantage within each prompt's group --> clipped policy update --> weight sync
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from checkpoint_tools.megatron_directory import hf_directory
from prism_megatron.config import schema
from prism_megatron.data.prompts import PromptEncoder
from prism_megatron.data.rows import BatchStream, PromptRow, read_prompts
from prism_megatron.objectives.advantages import group_normalise
from prism_megatron.objectives.rewards.scorer import Scorer, failure_counts
from prism_megatron.objectives.rewards.types import RewardItem
from prism_megatron.objectives.sections import response_text, token_bytes
from prism_megatron.rollout import fleet
from prism_megatron.rollout.fleet import share_out
from prism_megatron.rollout.rewards import reward_item
from prism_megatron.training.loop import Metrics, TrainingLoop
from prism_megatron.training.policy import policy_update
from prism_megatron.training.runner import ModelRunner
from prism_megatron.training.setup import build_encoder, build_runner, open_quarantine, start
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

    stream = BatchStream(
        read_prompts(config.data.path),
        task,
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
        updates_per_step=config.mini_batches,
    )
    loop = TrainingLoop(
        config, {"policy": (policy, config.policy.path)}, stream, quarantine, shown="reward"
    )
    done = loop.resume()
    engine = fleet.build(
        config.rollout,
        policy.model,
        hf_directory(config.policy.path),
        seed=config.run.seed,
        logs=config.run.dir / "engines",
    )
    trainer = Trainer(config, encoder, policy, engine)
    trainer.sync(done)
    if loop.run(lambda: trainer.step(stream.next_batch(), loop.step)):
        loop.export("policy")


class Trainer:
    """The policy and the engine that samples from it."""

    def __init__(
        self,
        config: schema.RLVR,
        encoder: PromptEncoder,
        policy: ModelRunner,
        engine: fleet.Fleet,
    ) -> None:
        self.config, self.encoder = config, encoder
        self.policy, self.engine = policy, engine
        self.table = token_bytes(encoder.tokenizer)
        self.scorer = Scorer(config.rewards)

    def step(self, tasks: list[Task], number: int) -> Metrics:
        """Sample, reward, train, hand the weights to the engine."""
        config = self.config
        rollouts = self.engine.generate([t.prompt for t in tasks], config.sampling, number)
        pairs = [(t, r) for t, group in zip(tasks, rollouts, strict=True) for r in group]
        rewards = share_out([self._item(*pair) for pair in pairs], self.scorer.score)
        totals = torch.tensor([reward.total for reward in rewards])
        groups = torch.arange(len(tasks)).repeat_interleave(config.sampling.n)

        policy = policy_update(
            self.policy,
            [(task.prompt, rollout) for task, rollout in pairs],
            group_normalise(totals, groups),
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            mini_batches=config.mini_batches,
        )
        self.sync(number + 1)
        return {
            "reward": float(totals.mean()),
            "accuracy": sum(reward.accuracy for reward in rewards) / len(rewards),
            "format_rate": sum(reward.format for reward in rewards) / len(rewards),
            **failure_counts(rewards),
            "response_tokens": sum(len(r.ids) for _, r in pairs) / len(pairs),
            **policy,
            "weight_version": self.engine.weight_version,
        }

    def sync(self, version: int) -> None:
        """Give the engine the policy's weights; it must answer with the version."""
        self.engine.sync(version)

    def _item(self, task: Task, rollout: Rollout) -> RewardItem:
        text = response_text(rollout.ids, self.table, (self.encoder.end_id,))
        return reward_item(task.row, text, finished=rollout.finish_reason == "stop")
