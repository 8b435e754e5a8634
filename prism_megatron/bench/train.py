"""Training steps of a true-shaped model with random weights, nothing frozen.

Times what a stage runs: packing on the host, forward, backward, gradient reduction, clipping,
AdamW, parameter gathering. With --save also checkpoints that are written while training goes on,
the first of which takes the host memory that the later ones use again.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from checkpoint_tools.headers import hf_directory
from model_providers import backend as backends
from model_providers import checks
from model_providers.architecture import Qwen3VLConfig
from model_providers.backend import Backend
from model_providers.config import Precision, Recompute, TrainingOptions
from model_providers.memory import training_bytes
from model_providers.parallel import Layout, ParallelState
from model_providers.presets import PRESETS, hf_config
from model_providers.qwen3_vl import Qwen3VLModel
from prism_megatron.bench import workload
from prism_megatron.bench.workload import Shape
from prism_megatron.config.schema import Optimizer
from prism_megatron.environment import check_host_memory
from prism_megatron.training.runner import ModelRunner
from prism_megatron.types import PackedBatch, Sequence

SWEPT = (
    "tensor",
    "context",
    "pipeline",
    "virtual_pipeline",
    "expert",
    "fp8",
    "recompute",
    "vision",
)
PLAIN = (1, "off", "none", "sharded")
"""Values that a result's name leaves out."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those named in SWEPT take several values, of which every combination is run."""
    add = parser.add_argument
    add("--model", required=True, metavar="NAME_OR_DIR", help=f"{', '.join(PRESETS)}")
    add("--backend", choices=("cpu", "cuda"), default="cpu", help="as in a stage's file; cpu")
    add("--layers", type=int, help="decoder layers, where all do not fit")
    for name in SWEPT[:5]:
        add(f"--{name.replace('_', '-')}", type=int, nargs="+", default=[1], metavar="N")
    recipes = ("off", "tensorwise", "delayed", "blockwise")
    add("--fp8", choices=recipes, nargs="+", default=["off"])
    add("--fp8-param-gather", action="store_true", help="the decoder's weights in FP8 as well")
    add("--recompute", choices=("none", "full"), nargs="+", default=["none"])
    add("--vision", choices=("sharded", "replicated"), nargs="+", default=["sharded"])
    add("--recompute-vision", action="store_true")
    add("--offload-layers", type=int, default=0, help="decoder layers' activations in host memory")
    add("--moments", choices=("float32", "bfloat16"), default="float32")
    add("--offload", action="store_true", help="optimizer state in host memory")
    add("--rows", type=int, default=4, help="rows a GPU and step; 4")
    add("--shortest", type=int, default=1024, help="tokens of a row; 1024")
    add("--longest", type=int, default=4096, help="tokens of a row; 4096")
    add("--side", type=int, default=56, help="of a row's image in patches; 56")
    add("--micro-batch-tokens", type=int, default=8192)
    add("--steps", type=int, default=5)
    add("--warmup", type=int, default=3)
    add("--profile", type=Path, help="write a table of kernel times here, and a trace beside it")
    add("--save", type=Path, metavar="DIR", help="write two checkpoints in the background here")


def run(options: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names and results of all combinations; every rank runs all of them."""
    config = PRESETS.get(options.model)
    if config is None:
        config = Qwen3VLConfig.from_hf(hf_directory(Path(options.model)))
    if options.layers:
        config = replace(config, num_layers=options.layers)
    shape = Shape(options.shortest, options.longest, options.side)
    shape.check(config)
    backend = backends.create(options.backend)
    backend.init_process_group()
    for values in product(*(getattr(options, name) for name in SWEPT)):
        chosen = argparse.Namespace(**vars(options) | dict(zip(SWEPT, values, strict=True)))
        sizes = dict(zip(SWEPT, values, strict=True))
        parts = [f"{name}{size}" for name, size in sizes.items() if size not in PLAIN]
        name = "-".join(["train", Path(options.model).name, f"{dist.get_world_size()}gpus", *parts])
        backend.reset_peak_memory()
        yield name, _measure(chosen, config, shape, backend)
        # the model is in cycles of references
        gc.collect()
        backend.release_cached()


def _measure(
    options: argparse.Namespace, config: Qwen3VLConfig, shape: Shape, backend: Backend
) -> dict[str, Any]:
    runner = _build(options, config, backend)
    world = dist.get_world_size()

    def step(number: int) -> tuple[float, float, list[Sequence]]:
        batch = workload.rows(config, options.rows * world, number, shape)
        tokens = float(sum(s.response_mask.sum() for s in batch))

        def loss(output: Tensor, packed: PackedBatch) -> tuple[Tensor, dict[str, Tensor]]:
            value = -(output * packed.loss_mask).sum() / tokens
            return value, {"loss": value.detach()}

        dist.barrier()
        backend.synchronize()
        started = time.perf_counter()
        result = runner.train_step(batch, loss)
        backend.synchronize()
        return time.perf_counter() - started, result.sums["loss"], batch

    for number in range(options.warmup):
        seconds, value, _ = step(number)
        if dist.get_rank() == 0:
            print(f"warm-up {number}: {seconds:.2f} s, loss {value:.3f}", flush=True)
    times, losses, batches = zip(*(step(100 + n) for n in range(options.steps)), strict=True)
    more: dict[str, Any] = {}
    if options.profile:
        more["profile"] = _profile(lambda: step(200), options.profile)
    if options.save:
        beside = iter(range(300, 10**6))
        more["saves"] = [_save(runner, lambda: step(next(beside))[0], options) for _ in range(2)]
    return {
        "what": "training step, nothing frozen, random weights",
        "kind": "train",
        "model": Path(options.model).name,
        "gpus": world,
        "layout": asdict(runner.parallel.layout),
        "fp8": options.fp8,
        "fp8_param_gather": options.fp8_param_gather,
        "moments": options.moments,
        "offload": options.offload,
        "recompute": options.recompute,
        "recompute_vision": options.recompute_vision,
        "offload_layers": options.offload_layers,
        "rows_per_gpu": options.rows,
        "shape": asdict(shape),
        "micro_batch_tokens": options.micro_batch_tokens,
        "layers": config.num_layers,
        "losses": list(losses),
        **more,
        **workload.throughput(config, list(batches), times, world, backend.device_name()),
        **workload.environment(backend),
    }


def _build(options: argparse.Namespace, config: Qwen3VLConfig, backend: Backend) -> ModelRunner:
    layout = Layout(
        tensor=options.tensor,
        context=options.context,
        pipeline=options.pipeline,
        virtual_pipeline=options.virtual_pipeline,
        expert=options.expert,
        sequence_parallel=options.tensor > 1,
        vision=options.vision,
    )
    training = TrainingOptions(
        recompute=Recompute(options.recompute, vision=options.recompute_vision),
        offload_layers=options.offload_layers,
        precision=Precision(
            None if options.fp8 == "off" else options.fp8, param_gather=options.fp8_param_gather
        ),
    )
    # before the first collective
    world = dist.get_world_size()
    layout.data(world), layout.expert_data(world)
    checks.check_model(config, layout, training, backend)
    if options.offload:
        tokens, moment = options.micro_batch_tokens, 2 if options.moments == "bfloat16" else 4
        needed = training_bytes(config, layout, world, tokens=tokens, moment_bytes=moment)
        check_host_memory(needed.optimizer)
    parallel = ParallelState.create(layout)
    backend.seed(1, parallel)
    with torch.device(backend.device):
        model = Qwen3VLModel(config, parallel, backend, options=training).to(backend.device)
    workload.randomise(model)
    return ModelRunner(
        model,
        micro_batch_tokens=options.micro_batch_tokens,
        pad_id=0,
        optimizer=Optimizer(
            lr=1e-5, betas=(0.9, 0.99), moments=options.moments, offload=options.offload
        ),
        steps=100,
    )


def _profile(run: Callable[[], object], file: Path) -> dict[str, float]:
    """One step: kernels by their time on the device, the trace, and how long the device had any."""
    from torch.autograd import DeviceType
    from torch.profiler import profile

    with profile() as recorded:
        run()
    device = DeviceType.CUDA if torch.accelerator.is_available() else DeviceType.CPU
    ranges = sorted(
        (event.time_range.start, event.time_range.end)
        for event in recorded.events()
        if event.device_type == device
    )
    busy, until = 0.0, ranges[0][0]
    for start, end in ranges:
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    if dist.get_rank() == 0:
        kind = "device" if device == DeviceType.CUDA else "cpu"
        table = recorded.key_averages().table(sort_by=f"self_{kind}_time_total", row_limit=60)
        file.write_text(table)
        recorded.export_chrome_trace(f"{file.with_suffix('')}.trace.json.gz")
    return {"span_s": (until - ranges[0][0]) / 1e6, "busy_s": busy / 1e6}


def _save(
    runner: ModelRunner, step: Callable[[], float], options: argparse.Namespace
) -> dict[str, Any]:
    """A checkpoint in the background: what training waited for, and the steps beside it."""
    box: list[Any] = [None, None]
    if dist.get_rank() == 0:
        box = [tempfile.mkdtemp(dir=options.save), tempfile.mkdtemp()]
    dist.broadcast_object_list(box)
    folder, hf = map(Path, box)
    source = hf_directory(Path(options.model)) if options.model not in PRESETS else hf
    if dist.get_rank() == 0 and source == hf:
        (hf / "config.json").write_text(json.dumps(hf_config(options.model)))
    dist.barrier()
    started = time.perf_counter()
    saving = runner.begin_save(folder / "checkpoint", source, in_background=True)
    stall = time.perf_counter() - started
    if dist.get_rank() == 0:
        print(f"training waited {stall:.2f} s; writing goes on beside it", flush=True)
    steps = []
    writing = torch.ones((), device=runner.model.backend.device)
    while bool(writing):
        steps.append(step())
        writing.fill_(float(saving.is_writing))
        dist.all_reduce(writing, dist.ReduceOp.MAX)
    ended = time.perf_counter()
    saving.finish()
    result = {
        "stall_s": stall,
        "finish_s": time.perf_counter() - ended,
        "total_s": time.perf_counter() - started,
        "steps_s": steps,
        "gib": sum(file.stat().st_size for file in folder.rglob("*.distcp")) / 2**30,
    }
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder)
        shutil.rmtree(hf)
    return result
