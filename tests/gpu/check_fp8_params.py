r"""Weights in FP8 (fp8_param_gather) against the same recipe with weights in BF16.

    torchrun --nproc-per-node N -m tests.gpu.check_fp8_params --recipe tensorwise [--offload] \
        [--layers L] --out FILE

Twenty steps from the same start: matrices are rounded from the same main weights either way, so
that losses differ by the order of sums alone. What is exported is compared with the other run's
export, and with what the model computes with, which is rounded. Then a checkpoint is resumed, and
its weights are read by models with weights in BF16 and in FP8. Peak memory of both.

The models are Qwen3-VL-2B with four decoder layers and four of the tower's blocks, and a small
Mixture-of-Experts discriminator, whose fp32 head stands among the other weights.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from checkpoint_tools import megatron_directory
from model_providers import backend as backends
from model_providers import fp8_weights
from model_providers.architecture import Qwen3VLConfig
from model_providers.config import Precision, TrainingOptions
from model_providers.parallel import Layout, ParallelState
from model_providers.presets import hf_config
from model_providers.qwen3_vl import Head, Qwen3VLModel
from model_providers.weight_plan import iter_hf_weights
from prism_megatron.bench import workload
from prism_megatron.config.schema import Optimizer
from prism_megatron.training.runner import ModelRunner
from tests.gpu import check_cuda_backend, fp8_curves

STEPS, AFTER = 20, 3
FIRST, CURVE = 1e-4, 2e-3
"""Distance of losses in the first step and in all, in units of the first loss. Kernels add in no
fixed order, see check_resume."""
E4M3 = 2**-4
"""Most that rounding to FP8 moves a value, but for the smallest ones."""
MATRIX = re.compile(r".*\.language_model\.layers\..*_proj(\.weight)?")
"""What is in FP8. The gradients of other weights, as of the tower's biases, may be noise alone, of
which Adam makes steps like any."""


class Case:
    """A model, what it is trained on, and how it is built."""

    def __init__(self, backend: Any, head: Head, options: argparse.Namespace) -> None:
        self.backend, self.head, self.options = backend, head, options
        if head == "language":
            self.raw = hf_config("qwen3-vl-2b", "5")
            self.raw["text_config"]["num_hidden_layers"] = options.layers
            # of which nothing is in FP8
            self.raw["vision_config"] |= {"depth": 4, "deepstack_visual_indexes": [1, 2, 3]}
            self.config = Qwen3VLConfig.from_dict(self.raw, "2b")
            self.layout = Layout()
        else:
            self.raw = check_cuda_backend.raw_config(True)
            self.config = Qwen3VLConfig.from_dict(self.raw, "moe")
            self.layout = Layout(expert=options.expert)

    def model(self, param_gather: bool) -> Qwen3VLModel:
        parallel = ParallelState.create(self.layout)
        self.backend.seed(1, parallel)
        precision = Precision(self.options.recipe, param_gather=param_gather)
        options = TrainingOptions(precision=precision)
        with torch.device(self.backend.device):
            model = Qwen3VLModel(self.config, parallel, self.backend, self.head, options)
        return model.to(self.backend.device)

    def runner(self, model: Qwen3VLModel) -> ModelRunner:
        state = {"moments": self.options.moments, "offload": self.options.offload}
        settings = Optimizer(lr=1e-4, betas=(0.9, 0.99), **state)
        tokens = 8192 if self.head == "language" else 512
        return ModelRunner(
            model, micro_batch_tokens=tokens, pad_id=0, optimizer=settings, steps=STEPS
        )

    def step(self, runner: ModelRunner, number: int) -> float:
        if self.head == "score":
            loss = check_cuda_backend.loss_of("score")
            return runner.train_step(check_cuda_backend.batch(), loss).sums["loss"]
        rows = fp8_curves.batch(number, self.config.vision.patch_dim, self.config.image_token_id)
        tokens = float(sum(row.response_mask.sum() for row in rows))

        def language(output: Tensor, packed: Any) -> Any:
            value = -(output * packed.loss_mask).sum() / tokens
            return value, {"loss": value.detach()}

        return runner.train_step(rows, language).sums["loss"]


def host(weights: Any) -> dict[str, Tensor]:
    return {name: tensor.cpu().clone() for name, tensor in weights}


def furthest(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> list[Any]:
    """The tensor that is furthest off, and how far, by its norm."""
    assert set(found) == set(wanted)
    apart = {}
    for name in wanted:
        a, b = (weights[name].cuda().double() for weights in (found, wanted))
        apart[name] = float((a - b).norm()) / (float(b.norm()) + 1e-30)
    worst = max(apart, key=apart.__getitem__)
    return [worst, apart[worst]]


def trained(case: Case, param_gather: bool, folder: Path) -> dict[str, Any]:
    """The curve, exports, peak memory; with param_gather what a checkpoint restores."""
    gc.collect()
    torch.accelerator.empty_cache()
    case.backend.reset_peak_memory()
    before = torch.accelerator.memory_allocated()
    model = case.model(param_gather)
    workload.randomise(model)
    start = host(iter_hf_weights(model))
    runner = case.runner(model)
    found: dict[str, Any] = {
        "rounded": sum(p.numel() for p in model.parameters() if fp8_weights.is_rounded(p)),
        "weights": sum(p.numel() for p in model.parameters()),
    }
    assert bool(found["rounded"]) == param_gather, found
    # what the runner exports before the first step is what was loaded, to the bit
    found["start_moved"] = furthest(host(iter_hf_weights(model)), start)
    losses = [case.step(runner, number) for number in range(STEPS)]
    found["losses"] = losses
    print(f"{case.head}, param_gather {param_gather}: trained to {losses[-1]:.3f}", flush=True)
    found["peak_gib"] = (case.backend.peak_memory() - before) / 2**30
    found["export"] = host(iter_hf_weights(model))
    # of a model in training nothing is kept but what its products see
    found["computed"] = host(iter_hf_weights(model, fp8_weights.value))
    if param_gather:
        found["resume"] = resumed(case, runner, folder)
    return found


def resumed(case: Case, first: ModelRunner, folder: Path) -> dict[str, Any]:
    hf, path = folder / f"hf-{case.head}", folder / f"checkpoint-{case.head}"
    if dist.get_rank() == 0:
        hf.mkdir(exist_ok=True)
        (hf / "config.json").write_text(json.dumps(case.raw))
    dist.barrier()
    exported = host(iter_hf_weights(first.model))
    started = time.perf_counter()
    first.save(path, hf)
    print(f"{case.head}: saved in {time.perf_counter() - started:.1f} s", flush=True)
    run = partial(_steps, case)
    undisturbed = run(first)
    second = case.runner(_random(case, True))
    second.load(path)
    restored = host(iter_hf_weights(second.model))
    result: dict[str, Any] = {
        "restored": furthest(restored, exported),
        "undisturbed": undisturbed,
        "resumed": run(second),
    }
    del second
    # weights alone, into a model with weights in BF16: the checkpoint is one like any other
    other = _random(case, False)
    megatron_directory.load(path, other)
    result["read_in_bf16"] = furthest(host(iter_hf_weights(other)), exported)
    # and into one in FP8, whose main weights then start from what is in the checkpoint
    third = _random(case, True)
    megatron_directory.load(path, third)
    runner = case.runner(third)
    result["read_in_fp8"] = furthest(host(iter_hf_weights(third)), exported)
    result["weights_alone"] = run(runner)
    return result


def _random(case: Case, param_gather: bool) -> Qwen3VLModel:
    model = case.model(param_gather)
    workload.randomise(model)
    return model


def _steps(case: Case, runner: ModelRunner) -> list[float]:
    return [case.step(runner, STEPS + number) for number in range(AFTER)]


def distance(found: list[float], wanted: list[float], scale: float) -> float:
    return max(abs(a - b) for a, b in zip(found, wanted, strict=True)) / scale


def compared(case: Case, folder: Path) -> dict[str, Any]:
    plain, held = trained(case, False, folder), trained(case, True, folder)
    scale = plain["losses"][0]

    def of_matrices(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in weights.items() if MATRIX.fullmatch(name)}

    result: dict[str, Any] = {
        "rounded_weights": held["rounded"],
        "weights": held["weights"],
        "losses_bf16_weights": plain["losses"],
        "losses_fp8_weights": held["losses"],
        "first_step": distance(held["losses"][:1], plain["losses"][:1], scale),
        "curve": distance(held["losses"], plain["losses"], scale),
        "resume": distance(held["resume"]["resumed"], held["resume"]["undisturbed"], scale),
        "start_moved": held["start_moved"],
        # of the two runs, which drift apart as their losses do
        "exports_apart": furthest(of_matrices(held["export"]), of_matrices(plain["export"])),
        # of what is exported and what is computed with
        "computed_apart": furthest(held["computed"], held["export"]),
        "peak_gib_bf16_weights": plain["peak_gib"],
        "peak_gib_fp8_weights": held["peak_gib"],
        **held["resume"],
    }
    return result


def check(name: str, found: dict[str, Any], offload: bool) -> None:
    assert found["first_step"] < FIRST, (name, "first_step", found)
    assert found["curve"] < CURVE, (name, "curve", found)
    assert found["start_moved"][1] == 0, (name, "start_moved", found)
    assert found["exports_apart"][1] < 0.05, (name, "exports_apart", found)
    assert 1e-3 < found["computed_apart"][1] < E4M3, (name, "computed_apart", found)
    assert found["restored"][1] == 0, (name, "restored", found)
    assert found["read_in_bf16"][1] == 0, (name, "read_in_bf16", found)
    assert found["read_in_fp8"][1] == 0, (name, "read_in_fp8", found)
    assert found["resume"] < CURVE, (name, "resume", found)
    lower = found["peak_gib_bf16_weights"] - found["peak_gib_fp8_weights"]
    if name == "language" and not offload:
        # two bytes of each weight in FP8; with the optimizer offloaded the peak is in the update,
        # in which a BF16 copy is made of all
        assert lower > 1.5 * found["rounded_weights"] / 2**30, (name, "memory", found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", choices=("tensorwise", "blockwise"), default="tensorwise")
    parser.add_argument("--layers", type=int, default=4, help="of the dense model")
    parser.add_argument("--expert", type=int, default=1, help="ranks, of the discriminator")
    parser.add_argument("--moments", default="float32")
    parser.add_argument("--offload", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    backend = backends.create("cuda")
    backend.init_process_group()
    box = [tempfile.mkdtemp()]
    dist.broadcast_object_list(box)
    result: dict[str, Any] = {k: v for k, v in vars(options).items() if k != "out"}
    heads: tuple[Head, ...] = ("language", "score")
    for head in heads:
        result[head] = compared(Case(backend, head, options), Path(box[0]))
    result["world"] = dist.get_world_size()
    if dist.get_rank() == 0:
        result |= workload.environment(backend)
        print(json.dumps(result, indent=2))
        options.out.write_text(json.dumps(result, indent=2) + "\n")
    for head in heads:
        check(head, result[head], options.offload)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
