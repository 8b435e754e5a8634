"""`prism-megatron bench train` as transformers and FSDP2 run it: what there is without Megatron.

    torchrun --nproc-per-node 4 -m tests.gpu.bench_hf_fsdp2 --model qwen3-vl-8b --out FILE

SDPA, activation checkpointing, BF16 compute on fp32 weights, fused AdamW, rows padded to the
longest of their micro-batch.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from model_providers import backend as backends
from model_providers.presets import PRESETS, hf_config
from prism_megatron.bench import workload
from prism_megatron.types import Sequence


def build(name: str) -> torch.nn.Module:
    raw = hf_config(name)
    raw.pop("model_type")
    config = Qwen3VLConfig(**raw)
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        model = Qwen3VLForConditionalGeneration._from_config(config, dtype=torch.float32)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.config.use_cache = False
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in [*model.model.visual.blocks, *model.model.language_model.layers]:
        fully_shard(block, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    model.to_empty(device="cuda")
    for key, parameter in model.named_parameters():
        norm = "norm" in key and key.endswith("weight")
        torch.nn.init.constant_(parameter, 1.0) if norm else torch.nn.init.normal_(
            parameter, 0, 0.02
        )
    _restore_buffers(model, config)
    return model.train()


def _restore_buffers(model: torch.nn.Module, config: Qwen3VLConfig) -> None:
    """Rotary frequencies are computed where a model is built, which `meta` leaves empty."""
    theta = {"language_model": config.text_config.rope_parameters["rope_theta"], "visual": 10000.0}
    for key, buffer in list(model.named_buffers()):
        assert key.endswith("inv_freq"), key
        exponent = torch.arange(buffer.numel(), device="cuda", dtype=torch.float) / buffer.numel()
        [base] = (value for part, value in theta.items() if f".{part}." in key)
        buffer.copy_(1.0 / base**exponent)


def collate(rows: list[Sequence], pad: int, image_token: int) -> dict[str, torch.Tensor]:
    longest = max(map(len, rows))

    def padded(values: list[torch.Tensor], fill: int) -> torch.Tensor:
        return torch.stack([F.pad(v, (0, longest - len(v)), value=fill) for v in values]).cuda()

    ids = [row.input_ids for row in rows]
    labels = [row.input_ids.masked_fill(~row.response_mask, -100) for row in rows]
    return {
        "input_ids": padded(ids, pad),
        "attention_mask": padded([torch.ones_like(i) for i in ids], 0),
        "mm_token_type_ids": padded([(i == image_token).long() for i in ids], 0),
        "labels": padded(labels, -100),
        "pixel_values": torch.cat([row.images[0].pixel_values for row in rows]).cuda(),
        "image_grid_thw": torch.tensor([row.images[0].grid_thw for row in rows]).cuda(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=PRESETS, required=True)
    parser.add_argument("--rows", type=int, default=4, help="rows a GPU and step")
    parser.add_argument("--micro-rows", type=int, default=4, help="rows a GPU and micro-batch")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl")
    rank, world = dist.get_rank(), dist.get_world_size()
    config = PRESETS[options.model]
    model = build(options.model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step(number: int) -> tuple[float, float, list[Sequence]]:
        batch = workload.rows(config, options.rows * world, number, workload.Shape())
        mine = batch[rank::world]
        dist.barrier()
        torch.cuda.synchronize()
        started = time.perf_counter()
        count = options.rows // options.micro_rows
        total = 0.0
        for i in range(count):
            rows = mine[i * options.micro_rows : (i + 1) * options.micro_rows]
            model.set_requires_gradient_sync(i == count - 1)
            output = model(**collate(rows, 0, config.image_token_id), use_cache=False)
            (output.loss / count).backward()
            total += output.loss.item() / count
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()
        return time.perf_counter() - started, total, batch

    for number in range(options.warmup):
        seconds, value, _ = step(number)
        if rank == 0:
            print(f"warm-up {number}: {seconds:.2f} s, loss {value:.3f}", flush=True)
    times, losses, batches = [], [], []
    for number in range(options.steps):
        seconds, value, batch = step(100 + number)
        times.append(seconds)
        losses.append(value)
        batches.append(batch)
    result = (
        {
            "what": "training step with transformers, FSDP2, SDPA, activation checkpointing",
            "model": options.model,
            "gpus": world,
            "rows_per_gpu": options.rows,
            "rows_per_micro_batch": options.micro_rows,
            "losses": losses,
        }
        | workload.throughput(config, batches, times, world, torch.cuda.get_device_name())
        | workload.environment(backends.create("cuda"))
    )
    if rank == 0:
        print(json.dumps(result, indent=2), flush=True)
        options.out.write_text(json.dumps(result, indent=2) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
