r"""Activations in host memory (offload_layers) against the same training with all on the GPU.

    torchrun --nproc-per-node N -m tests.gpu.check_offload [--fp8 RECIPE] [--expert E] --out FILE

Three steps of packed rows, whose micro-batches vary in number and length, with a pass without
gradients between them. Gradients of the first step, losses of all, peak memory, and seconds of the
last. A second run without offload says how far runs are apart by themselves: kernels add in no
fixed order. An activation that came back wrong would be no multiple of that.

The models are Qwen3-VL-2B with eight decoder layers, and Qwen3-VL-30B-A3B with four and sixteen
experts.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from model_providers import backend as backends
from model_providers.architecture import Qwen3VLConfig
from model_providers.config import Precision, TrainingOptions
from model_providers.memory import NO_RECOMPUTE, token_bytes
from model_providers.parallel import Layout, ParallelState
from model_providers.presets import PRESETS
from model_providers.qwen3_vl import Qwen3VLModel
from model_providers.weight_plan import iter_hf_weights
from prism_megatron.bench import workload
from prism_megatron.config.schema import Optimizer
from prism_megatron.training.policy import response_logprobs
from prism_megatron.training.runner import ModelRunner
from prism_megatron.types import PackedBatch, Sequence
from tests.gpu.fp8_curves import ROWS, batch

TOKENS = 8192
ROWS_OF_STEPS = (16, 5, 11)
"""Of 256 to 1,024 tokens: two or three micro-batches, one, and two."""
NEAR = 1e-2
"""Most that a gradient may differ by, and losses; or twice as much as two runs without offload."""


def rows(config: Qwen3VLConfig, step: int) -> list[Sequence]:
    whole = batch(step, config.vision.patch_dim, config.image_token_id)[: ROWS_OF_STEPS[step]]
    assert len(whole) <= ROWS
    return [
        replace(row, input_ids=row.input_ids[:size], response_mask=row.response_mask[:size])
        for number, row in enumerate(whole)
        for size in [256 + 48 * ((5 * number + step) % 17)]
    ]


def loss_of(sequences: list[Sequence]) -> Any:
    tokens = float(sum(row.response_mask.sum() for row in sequences))

    def loss(output: Tensor, packed: PackedBatch) -> tuple[Tensor, dict[str, Tensor]]:
        value = -(output * packed.loss_mask).sum() / tokens
        return value, {"loss": value.detach()}

    return loss


def trained(
    backend: Any, config: Qwen3VLConfig, layout: Layout, fp8: Any, layers: int
) -> dict[str, Any]:
    gc.collect()
    torch.accelerator.empty_cache()
    before = torch.accelerator.memory_allocated()
    parallel = ParallelState.create(layout)
    backend.seed(1, parallel)
    options = TrainingOptions(offload_layers=layers, precision=Precision(fp8))
    model = Qwen3VLModel(config, parallel, backend, options=options).to(backend.device)
    workload.randomise(model)
    runner = ModelRunner(
        model, micro_batch_tokens=TOKENS, pad_id=0, optimizer=Optimizer(lr=1e-4), steps=3
    )
    losses, inferred, grads, peak, seconds = [], [], {}, 0, 0.0
    for step in range(len(ROWS_OF_STEPS)):
        sequences = rows(config, step)
        if step == 0:
            # of the passes alone: an update of these few layers takes more
            backend.reset_peak_memory()
            grads = gradients(runner, sequences)
            peak = backend.peak_memory() - before
        backend.synchronize()
        started = time.monotonic()
        losses.append(runner.train_step(sequences, loss_of(sequences)).sums["loss"])
        seconds = time.monotonic() - started
        inferred.append(float(torch.cat(runner.infer(sequences, response_logprobs)).mean()))
    return {
        "losses": losses,
        "inferred": inferred,
        "grads": grads,
        "peak_gib": peak / 2**30,
        "last_step_s": seconds,
    }


def gradients(runner: ModelRunner, sequences: list[Sequence]) -> dict[str, Tensor]:
    """Of every parameter, on the CPU; buffers are zeroed by the step that follows."""
    runner.model.train()
    finalize = runner.model.config.finalize_model_grads_func
    runner.model.config.finalize_model_grads_func = lambda models, tokens, **kwargs: finalize(
        models, tokens, **(kwargs | {"force_all_reduce": True})
    )
    for chunk in runner.ddp:
        chunk.force_all_reduce = True
        chunk.zero_grad_buffer()
    runner.forward_backward(sequences, loss_of(sequences))
    found = {
        name: tensor.float().cpu().clone()
        for name, tensor in iter_hf_weights(runner.model, lambda p: p.main_grad.to(p.dtype))
    }
    runner.model.config.finalize_model_grads_func = finalize
    for chunk in runner.ddp:
        chunk.force_all_reduce = False
    return found


def apart(found: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    # biases of keys have no gradient but noise
    names = [n for n in wanted["grads"] if not n.endswith("qkv.bias")]
    by_name = {
        name: float((found["grads"][name] - wanted["grads"][name]).norm())
        / (float(wanted["grads"][name].norm()) + 1e-30)
        for name in names
    }
    worst = max(by_name, key=by_name.__getitem__)
    return {
        "gradient": [worst, by_name[worst]],
        "loss": _furthest(found["losses"], wanted["losses"]),
        "inferred": _furthest(found["inferred"], wanted["inferred"]),
    }


def _furthest(found: list[float], wanted: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(found, wanted, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fp8", choices=("tensorwise", "blockwise", "delayed"))
    parser.add_argument("--expert", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    backend = backends.create("cuda")
    backend.init_process_group()
    result: dict[str, Any] = {"fp8": options.fp8, "expert": options.expert}
    models = {
        "dense": (replace(PRESETS["qwen3-vl-2b"], num_layers=8), Layout(), 6),
        "moe": (
            replace(PRESETS["qwen3-vl-30b-a3b"], num_layers=4, num_experts=16),
            Layout(expert=options.expert),
            3,
        ),
    }
    for name, (config, layout, layers) in models.items():
        again, plain, moved = (
            trained(backend, config, layout, options.fp8, count) for count in (0, 0, layers)
        )
        kept = token_bytes(config, NO_RECOMPUTE, options.fp8 is not None)[0]
        result[name] = {
            "layers": config.num_layers,
            "offloaded": layers,
            "by_itself": apart(again, plain),
            "offloaded_apart": apart(moved, plain),
            "losses": plain["losses"],
            "losses_offloaded": moved["losses"],
            "peak_gib": plain["peak_gib"],
            "peak_gib_offloaded": moved["peak_gib"],
            "planned_gib": layers * kept * TOKENS / 2**30,
            "last_step_s": plain["last_step_s"],
            "last_step_s_offloaded": moved["last_step_s"],
        }
    result["world"] = dist.get_world_size()
    if dist.get_rank() == 0:
        result |= workload.environment(backend)
        print(json.dumps(result, indent=2))
        options.out.write_text(json.dumps(result, indent=2) + "\n")
    for name in models:
        found = result[name]
        for value in ("gradient", "loss", "inferred"):
            far, itself = (
                run[value][1] if value == "gradient" else run[value]
                for run in (found["offloaded_apart"], found["by_itself"])
            )
            assert far < max(NEAR, 2 * itself), (name, value, found)
        saved = found["peak_gib"] - found["peak_gib_offloaded"]
        # two layers' are on their way at any time; the largest micro-batch is not quite full
        share = (found["offloaded"] - 2) / found["offloaded"]
        assert saved > 0.8 * share * found["planned_gib"], (name, "memory", found)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
