"""Stage 1, supervised fine-tuning.

sharegpt rows --> prompt + demonstration --> packed micro-batches --> -mean log p(response)
"""

from __future__ import annotations

import torch
from torch import Tensor

from prism_megatron.config import schema
from prism_megatron.data.rows import SFTRow, read_sft
from prism_megatron.data.sources import open_sources
from prism_megatron.data.stream import BatchStream
from prism_megatron.objectives.losses import sft_loss
from prism_megatron.training.loop import Metrics, TrainingLoop
from prism_megatron.training.runner import ModelRunner
from prism_megatron.training.setup import build_encoder, build_runner, open_quarantine, start
from prism_megatron.types import PackedBatch, Sequence


def run(config: schema.SFT) -> None:
    """Train config.model and export it to run.dir/hf."""
    backend = start(config)
    encoder = build_encoder(config.model.path, config.data)
    quarantine = open_quarantine(config.run, config.data)

    def demonstration(row: SFTRow) -> Sequence:
        return encoder.sft_sequence(encoder.encode_prompt(row), row.response)

    stream = BatchStream(
        open_sources(config.data, read_sft),
        demonstration,
        quarantine,
        batch_size=config.batch_size,
        seed=config.run.seed,
        num_workers=config.data.num_workers,
    )
    model = build_runner(
        config.model,
        config.optimizer,
        backend,
        config.train,
        config.run,
        pad_id=encoder.pad_id,
    )
    loop = TrainingLoop(
        config, {"model": (model, config.model.path)}, stream, quarantine, shown="loss"
    )
    loop.resume()
    if loop.run(lambda: step(model, stream.next_batch())):
        loop.export("model")


def step(model: ModelRunner, sequences: list[Sequence]) -> Metrics:
    """One optimizer step on the mean negative log-likelihood of all response tokens."""
    tokens = int(torch.stack([s.response_mask.sum() for s in sequences]).sum())

    def loss(logprobs: Tensor, batch: PackedBatch) -> tuple[Tensor, dict[str, Tensor]]:
        value = sft_loss(logprobs, batch.loss_mask, tokens)
        return value, {"loss": value.detach()}

    result = model.train_step(sequences, loss)
    return result.sums | {"grad_norm": result.grad_norm, "lr": result.lr, "tokens": tokens}
