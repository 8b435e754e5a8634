"""Full training steps of a true-shaped Qwen3-VL with random weights, nothing frozen.

    torchrun --nproc-per-node 4 -m tests.gpu.bench_training --model qwen3-vl-8b --out FILE

Times what a stage runs: packing on the host, forward, backward, gradient reduction, clipping,
AdamW, parameter gathering. Prints and writes one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from model_providers import backend as backends
from model_providers.config import Precision, Recompute, TrainingOptions
from model_providers.parallel import Layout, ParallelState
from model_providers.presets import PRESETS
from model_providers.qwen3_vl import Qwen3VLModel
from prism_megatron.config.schema import Optimizer
from prism_megatron.training.runner import ModelRunner
from prism_megatron.types import PackedBatch, Sequence
from tests.gpu import workload


def build(options: argparse.Namespace) -> ModelRunner:
    backend = backends.create("cuda")
    backend.init_process_group()
    layout = Layout(
        tensor=options.tensor,
        pipeline=options.pipeline,
        expert=options.expert,
        sequence_parallel=options.tensor > 1,
    )
    parallel = ParallelState.create(layout)
    backend.seed(1, parallel)
    config = PRESETS[options.model]
    if options.layers:
        config = replace(config, num_layers=options.layers)
    training = TrainingOptions(
        recompute=Recompute(vision=options.recompute_vision),
        precision=Precision(fp8=None if options.fp8 == "off" else options.fp8),
    )
    with torch.device(backend.device):
        model = Qwen3VLModel(config, parallel, backend, options=training).to(backend.device)
    workload.randomise(model)
    return ModelRunner(
        model,
        micro_batch_tokens=options.micro_batch_tokens,
        pad_id=0,
        optimizer=Optimizer(lr=1e-5, moments=options.moments, offload=options.offload),
        steps=100,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=PRESETS, required=True)
    parser.add_argument("--layers", type=int, help="decoder layers, where all do not fit")
    parser.add_argument("--tensor", type=int, default=1)
    parser.add_argument("--pipeline", type=int, default=1)
    parser.add_argument("--expert", type=int, default=1)
    parser.add_argument("--fp8", default="off")
    parser.add_argument("--moments", default="float32")
    parser.add_argument("--offload", action="store_true", help="optimizer state in host memory")
    parser.add_argument("--recompute-vision", action="store_true")
    parser.add_argument("--rows", type=int, default=4, help="rows a GPU and step")
    parser.add_argument("--micro-batch-tokens", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--profile", type=Path, help="write a table of kernel times here")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    runner = build(options)
    config, world = runner.model.architecture, dist.get_world_size()

    def step(number: int) -> tuple[float, float, list[Sequence]]:
        batch = workload.rows(config, options.rows * world, number)
        tokens = float(sum(s.response_mask.sum() for s in batch))

        def loss(output: Tensor, packed: PackedBatch) -> tuple[Tensor, dict[str, Tensor]]:
            value = -(output * packed.loss_mask).sum() / tokens
            return value, {"loss": value.detach()}

        dist.barrier()
        torch.accelerator.synchronize()
        started = time.perf_counter()
        result = runner.train_step(batch, loss)
        torch.accelerator.synchronize()
        return time.perf_counter() - started, result.sums["loss"], batch

    for number in range(options.warmup):
        seconds, value, _ = step(number)
        if dist.get_rank() == 0:
            print(f"warm-up {number}: {seconds:.2f} s, loss {value:.3f}", flush=True)
    times, losses, batches = [], [], []
    for number in range(options.steps):
        seconds, value, batch = step(100 + number)
        times.append(seconds)
        losses.append(value)
        batches.append(batch)
    if options.profile:
        profile(lambda: step(200), options.profile)
    result = (
        {
            "what": "training step, nothing frozen, random weights",
            "model": options.model,
            "gpus": world,
            "layout": asdict(runner.parallel.layout),
            "fp8": options.fp8,
            "moments": options.moments,
            "offload": options.offload,
            "recompute_vision": options.recompute_vision,
            "rows_per_gpu": options.rows,
            "micro_batch_tokens": options.micro_batch_tokens,
            "layers": config.num_layers,
            "losses": losses,
        }
        | workload.throughput(config, batches, times, world)
        | workload.environment()
    )
    if dist.get_rank() == 0:
        print(json.dumps(result, indent=2), flush=True)
        options.out.write_text(json.dumps(result, indent=2) + "\n")
    dist.destroy_process_group()


def profile(run: object, file: Path) -> None:
    """Kernels of one step by their time on the device."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    with record(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        run()  # type: ignore[operator]
    if dist.get_rank() == 0:
        table = recorded.key_averages().table(sort_by="self_cuda_time_total", row_limit=60)
        file.write_text(table)


if __name__ == "__main__":
    main()
