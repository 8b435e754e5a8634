r"""The experts of a layer (model_providers/experts.py) against megatron.core's on one GPU.

    torchrun --nproc-per-node 1 -m tests.gpu.check_experts --out FILE

With the same weights and tokens, some experts without any: outputs and gradients of both, each
against one product an expert in fp32. Then the time of a pass and its backward pass at
Qwen3-VL-30B-A3B's width with 64 experts: until the host has queued it, and until it is done.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model_providers import backend as backends
from model_providers.config import DEFAULT_OPTIONS, text_transformer_config
from model_providers.experts import StackedExperts
from model_providers.parallel import Layout, ParallelState
from model_providers.presets import PRESETS
from prism_megatron.bench import workload

EXPERTS = 64
REPEATS = 20


def build(experts: int) -> dict[str, nn.Module]:
    """Ours and megatron.core's, with the same weights."""
    backend = backends.create("cuda")
    parallel = ParallelState.create(Layout())
    backend.seed(1, parallel)
    config = text_transformer_config(
        PRESETS["qwen3-vl-30b-a3b"], Layout(), backend, DEFAULT_OPTIONS
    )
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


def oracle(module: nn.Module, tokens: Tensor, counts: list[int], weights: Tensor, slope: Tensor):
    """The same, one expert after the other in fp32: output and gradients."""
    up, down = (linear.weight.detach().float().requires_grad_() for linear in module.children())
    tokens = tokens.detach().float().requires_grad_()
    parts = []
    for index, (own, weight) in enumerate(
        zip(tokens.split(counts), weights.split(counts), strict=True)
    ):
        gate, value = F.linear(own, up[index]).chunk(2, dim=-1)
        parts.append(F.linear(F.silu(gate) * value * weight[:, None], down[index]))
    out = torch.cat(parts)
    grads = torch.autograd.grad(out, (tokens, up, down), slope.float())
    return {"out": out.detach(), "tokens": grads[0], "linear_fc1": grads[1], "linear_fc2": grads[2]}


def run(module: nn.Module, tokens: Tensor, counts: list[int], weights: Tensor, slope: Tensor):
    forget(module)
    tokens = tokens.detach().requires_grad_()
    out, _ = module(tokens, torch.tensor(counts), weights)
    out.backward(slope)
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


def timed(module: nn.Module, tokens: Tensor, counts: list[int], weights: Tensor, slope: Tensor):
    tokens.requires_grad_()
    counted = torch.tensor(counts)
    queued, done = [], []
    for _ in range(REPEATS):
        torch.accelerator.synchronize()
        started = time.perf_counter()
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
    result: dict[str, Any] = {"experts": EXPERTS, "apart": {}, "times": {}}
    few = build(6)
    hidden = PRESETS["qwen3-vl-30b-a3b"].hidden_size
    for counts in ([0, 37, 0, 0, 501, 11], [3, 0, 0, 0, 0, 0], [129, 5, 64, 1, 2, 0], [0] * 6):
        tokens, weights, slope = draw(counts, hidden)
        # memory that torch hands out again must not show through where an expert has no token
        dirty = [torch.full((6, 2048, 2048), float("nan"), dtype=torch.bfloat16) for _ in range(4)]
        del dirty
        wanted = oracle(few["stacked"], tokens, counts, weights, slope)
        for name, module in few.items():
            if sum(counts) or name == "stacked":
                found = run(module, tokens, counts, weights, slope)
                result["apart"][f"{name} {counts}"] = apart(found, wanted)
        print(counts, {k: v for k, v in result["apart"].items() if str(counts) in k}, flush=True)
    many = build(EXPERTS)
    features = PRESETS["qwen3-vl-30b-a3b"].moe_intermediate_size
    for total in (65536, 131072):
        share = torch.rand(EXPERTS, device="cpu") + 0.5
        counts = (share / share.sum() * total).long().tolist()
        inputs = draw(counts, hidden)
        for name, module in many.items():
            times = timed(module, inputs[0], counts, *inputs[1:])
            flops = 3 * 2 * sum(counts) * 3 * hidden * features
            times["tflops"] = flops / times["done_ms"] / 1e9
            result["times"][f"{name} {total}"] = times
            print(name, total, times, flush=True)
    for total in (65536, 131072):
        ours, theirs = (result["times"][f"{name} {total}"] for name in ("stacked", "megatron"))
        result[f"times_as_fast_{total}"] = theirs["done_ms"] / ours["done_ms"]
    result |= workload.environment(backend)
    print(json.dumps(result, indent=2))
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    for case, values in result["apart"].items():
        # BF16 keeps eight bits
        assert all(value < 0.01 for value in values.values()), (case, values)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
