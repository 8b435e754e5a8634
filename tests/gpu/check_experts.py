r"""The experts of a layer (model_providers/experts.py) against megatron.core's on one GPU.

    torchrun --nproc-per-node 1 -m tests.gpu.check_experts --out FILE

With the same weights and tokens, some experts without any: outputs and gradients of both in BF16,
and of ours in FP8, each against one product an expert in fp32; in FP8 with operands that the oracle
rounds, to the very bits that the kernels round to. Then the time of a pass and its backward pass at
the width of Qwen3-VL-30B-A3B with 64 experts and of 235B-A22B with 16, in BF16 and FP8: until the
host has queued it, and until it is done.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformer_engine.pytorch as te
from torch import Tensor, nn
from transformer_engine.common.recipe import Float8CurrentScaling

from model_providers import backend as backends
from model_providers.config import Precision, TrainingOptions, text_transformer_config
from model_providers.experts import StackedExperts
from model_providers.fp8_experts import by_columns, by_rows
from model_providers.parallel import Layout, ParallelState
from model_providers.presets import PRESETS
from prism_megatron.bench import workload

SIZES = {"qwen3-vl-30b-a3b": 64, "qwen3-vl-235b-a22b": 16}
"""Experts of a rank, with expert parallelism over 2 and over 8."""
REPEATS = 20


def fp8() -> AbstractContextManager[Any]:
    """As megatron.core enters it around a layer."""
    context: AbstractContextManager[Any] = te.autocast(enabled=True, recipe=Float8CurrentScaling())
    return context


CONTEXTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {"bf16": nullcontext, "fp8": fp8}


def build(preset: str, experts: int) -> dict[str, nn.Module]:
    """Ours and megatron.core's, with the same weights."""
    backend = backends.create("cuda")
    parallel = ParallelState.create(Layout())
    backend.seed(1, parallel)
    options = TrainingOptions(precision=Precision("tensorwise"))
    config = text_transformer_config(PRESETS[preset], Layout(), backend, options)
    ours = StackedExperts(experts, config, pg_collection=parallel.groups)
    theirs = backend.layers.grouped_mlp_modules(True)(
        experts, config, pg_collection=parallel.groups
    )
    with torch.no_grad():
        for name, linear in ours.named_children():
            linear.weight.normal_(0, 0.02)
            for index in range(experts):
                getattr(getattr(theirs, name), f"weight{index}").copy_(linear.weight[index])
    for module in (ours, theirs):
        for parameter in module.parameters():
            # as megatron.core's wrapper gives them; theirs adds to it by itself
            parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)
            parameter.grad_added_to_main_grad = False
    return {"stacked": ours, "megatron": theirs}


def gradient(module: nn.Module, name: str) -> Tensor:
    """[experts, out, in] fp32, since the buffers were zeroed."""
    linear = getattr(module, name)
    found = [
        parameter.main_grad if parameter.grad_added_to_main_grad else parameter.grad.float()
        for parameter in linear.parameters()
    ]
    return found[0] if found[0].dim() == 3 else torch.stack(found)


def forget(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.grad = None
        parameter.main_grad.zero_()


def rounded_rows(values: Tensor) -> tuple[Tensor, Tensor]:
    """What by_rows says, by torch."""
    scales = values.float().abs().amax(-1).clamp(min=1e-12) / 448
    return (values.float() / scales[..., None]).to(torch.float8_e4m3fn), scales


def as_rounded(values: Tensor) -> Tensor:
    """What the rounded rows stand for."""
    cast, scales = rounded_rows(values)
    return cast.float() * scales[..., None]


class RoundedLinear(torch.autograd.Function):
    """One expert's product as fp8_experts.py has it, in fp32."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(tokens, weight)
        return as_rounded(tokens) @ as_rounded(weight).T

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, Tensor]:
        tokens, weight = ctx.saved_tensors
        return as_rounded(slope) @ as_rounded(weight.T.contiguous()).T, slope.T @ tokens


def oracle(
    module: nn.Module,
    tokens: Tensor,
    counts: list[int],
    weights: Tensor,
    slope: Tensor,
    linear: Callable[[Tensor, Tensor], Tensor],
) -> dict[str, Tensor]:
    """The same, one expert after the other in fp32: output and gradients."""
    up, down = (weight.detach().float().requires_grad_() for weight in module.parameters())
    tokens = tokens.detach().float().requires_grad_()
    parts = []
    for index, (own, weight) in enumerate(
        zip(tokens.split(counts), weights.split(counts), strict=True)
    ):
        gate, value = linear(own, up[index]).chunk(2, dim=-1)
        parts.append(linear(F.silu(gate) * value * weight[:, None], down[index]))
    out = torch.cat(parts)
    grads = torch.autograd.grad(out, (tokens, up, down), slope.float())
    return {"out": out.detach(), "tokens": grads[0], "linear_fc1": grads[1], "linear_fc2": grads[2]}


def run(
    module: nn.Module,
    tokens: Tensor,
    counts: list[int],
    weights: Tensor,
    slope: Tensor,
    precision: str,
) -> dict[str, Tensor]:
    forget(module)
    tokens = tokens.detach().requires_grad_()
    with CONTEXTS[precision]():
        out, _ = module(tokens, torch.tensor(counts), weights)
    out.backward(slope)
    assert tokens.grad is not None
    return {
        "out": out.detach(),
        "tokens": tokens.grad,
        "linear_fc1": gradient(module, "linear_fc1"),
        "linear_fc2": gradient(module, "linear_fc2"),
    }


def draw(counts: list[int], hidden: int) -> tuple[Tensor, Tensor, Tensor]:
    total = sum(counts)
    tokens = torch.randn(total, hidden, dtype=torch.bfloat16)
    return tokens, torch.rand(total), torch.randn(total, hidden, dtype=torch.bfloat16) / 64


def apart(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    """Relative distance of each."""
    return {
        name: float((found[name].float() - value).norm() / (value.norm() + 1e-30))
        for name, value in wanted.items()
    }


def timed(
    module: nn.Module,
    tokens: Tensor,
    counts: list[int],
    weights: Tensor,
    slope: Tensor,
    precision: str,
) -> dict[str, float]:
    tokens.requires_grad_()
    counted = torch.tensor(counts)
    queued, done = [], []
    for _ in range(REPEATS):
        torch.accelerator.synchronize()
        started = time.perf_counter()
        with CONTEXTS[precision]():
            out, _ = module(tokens, counted, weights)
        out.backward(slope)
        for parameter in module.parameters():
            # what megatron.core's hook of each parameter does
            if not parameter.grad_added_to_main_grad:
                parameter.main_grad.add_(parameter.grad)
            parameter.grad = None
        queued.append(time.perf_counter() - started)
        torch.accelerator.synchronize()
        done.append(time.perf_counter() - started)
    half = REPEATS // 2
    return {
        "queued_ms": 1e3 * statistics.median(queued[half:]),
        "done_ms": 1e3 * statistics.median(done[half:]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    backend = backends.create("cuda")
    backend.init_process_group()
    torch.set_default_device(backend.device)
    torch.manual_seed(0)
    result: dict[str, Any] = {"apart": {}, "times": {}}
    few = build("qwen3-vl-30b-a3b", 6)
    hidden = PRESETS["qwen3-vl-30b-a3b"].hidden_size
    for counts in ([0, 37, 0, 0, 501, 11], [3, 0, 0, 0, 0, 0], [129, 5, 64, 1, 2, 0], [0] * 6):
        inputs = draw(counts, hidden)
        tokens, weights, slope = inputs
        # memory that torch hands out again must not show through where an expert has no token
        dirty = [torch.full((6, 2048, 2048), float("nan"), dtype=torch.bfloat16) for _ in range(4)]
        del dirty
        for precision, linear in (("bf16", F.linear), ("fp8", RoundedLinear.apply)):
            wanted = oracle(few["stacked"], tokens, counts, weights, slope, linear)
            for name, module in few.items():
                if precision == "fp8" and name == "megatron":
                    continue
                if sum(counts) or name == "stacked":
                    found = run(module, tokens, counts, weights, slope, precision)
                    result["apart"][f"{name} {precision} {counts}"] = apart(found, wanted)
        print(counts, {k: v for k, v in result["apart"].items() if str(counts) in k}, flush=True)
    result["same_bits"] = same_bits(few["stacked"])
    del few
    for preset, experts in SIZES.items():
        _times(result, preset, experts)
    result |= workload.environment(backend)
    print(json.dumps(result, indent=2))
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    for case, values in result["apart"].items():
        # BF16 keeps eight bits; by one of them a value may be rounded to the next in FP8, which is
        # a sixteenth away
        near = {"out": 0.03, "tokens": 0.03} if "fp8" in case else {}
        assert all(v < near.get(name, 0.01) for name, v in values.items()), (case, values)
    assert result["same_bits"]
    torch.distributed.destroy_process_group()


def same_bits(module: nn.Module) -> bool:
    """Whether the kernels round as torch does, also zeros and rows that are no power of two."""
    equal = []
    tokens = (
        torch.randn(77, 1536 // 2 + 16, dtype=torch.bfloat16) * torch.logspace(-9, 9, 77)[:, None]
    )
    tokens = tokens.bfloat16()
    tokens[5] = 0
    for rows in (tokens, *(weight.detach() for weight in module.parameters())):
        for mine, theirs in zip(by_rows(rows), rounded_rows(rows), strict=True):
            equal.append(torch.equal(mine.view(torch.uint8), theirs.view(torch.uint8)))
    for values in (tokens[None], *(weight.detach() for weight in module.parameters())):
        turned = values.transpose(1, 2).contiguous()
        for mine, theirs in zip(by_columns(values), rounded_rows(turned), strict=True):
            equal.append(torch.equal(mine.view(torch.uint8), theirs.view(torch.uint8)))
    return all(equal)


def _times(result: dict[str, Any], preset: str, experts: int) -> None:
    """Of both in both precisions, and how many times as fast as megatron.core's ours are."""
    modules = build(preset, experts)
    config = PRESETS[preset]
    for total in (65536, 131072):
        share = torch.rand(experts, device="cpu") + 0.5
        # in FP8 theirs wants whole multiples of 16
        counts = ((share / share.sum() * total).long() // 16 * 16).tolist()
        inputs = draw(counts, config.hidden_size)
        flops = 3 * 2 * sum(counts) * 3 * config.hidden_size * config.moe_intermediate_size
        for precision in CONTEXTS:
            for name, module in modules.items():
                times = timed(module, inputs[0], counts, *inputs[1:], precision)
                times["tflops"] = flops / times["done_ms"] / 1e9
                case = f"{preset}, {experts} experts, {total} tokens, {precision}"
                result["times"].setdefault(case, {})[name] = times
                print(case, name, times, flush=True)
            both = result["times"][case]
            both["times_as_fast"] = both["megatron"]["done_ms"] / both["stacked"]["done_ms"]


if __name__ == "__main__":
    main()
