"""The directory that servers are started with when each sync quantises the weights on their way.

    policy's config.json + quantization_config, processor, no weights --> SERVED
    server: FP8 parameters and their scales, empty until the first sync

What the engines' own code says of a second load into such a model (SGLang 0.5.12, vLLM 0.22):

- Names, shapes and types are those of a checkpoint of the DeepSeek layout: what is sent is what
  checkpoint_tools.quantize writes. Fused experts have no place in it; they come one by one.
- SGLang on Hopper leaves weights and scales as they were loaded (layers/quantization/fp8.py), so
  that load_weights works any number of times, by memory, NCCL or disk. On Blackwell with DeepGEMM
  it repacks the scales (UE8M0), and a second load stops with an assertion about their shape;
  SGLANG_ENABLE_JIT_DEEPGEMM=0 keeps them. Before Hopper weights are repacked (Marlin), and nothing
  can be loaded after.
- vLLM replaces the parameters after a load; vllm_server.py has them given back for the next.
- A matrix is cut between tensor-parallel ranks at blocks only.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from checkpoint_tools import hf_writer, world
from checkpoint_tools.files import replace_folder, staging_of
from model_providers.architecture import Qwen3VLConfig
from model_providers.fp8_blocks import BLOCK, quantization_config
from model_providers.qwen3_vl import Qwen3VLModel
from model_providers.weight_plan import WeightPlan
from prism_megatron.config import schema

EXPERT_PARALLEL = ("--ep", "--ep-size", "--expert-parallel-size", "--enable-expert-parallel")


def served_directory(
    config: schema.Rollout, model: Qwen3VLModel, hf_dir: Path, served: Path
) -> Path:
    """Write `served`, which servers on all nodes have to see; every rank calls this.

    hf_dir: the policy's config and processor. If that is itself a model quantised alike, servers
    are started with it, weights and all.

    Raises:
        ValueError: the model can't be cut into blocks, or not between `config.tensor` ranks.
    """
    check_cut(config, model.architecture)
    plan = WeightPlan(model, receivers=[], quantization=config.quantization)
    whole = [tensor for bucket in plan.buckets for tensor in bucket.tensors]
    made = quantization_config(
        (tensor.name, torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"))
        for tensor in whole
    )
    raw = json.loads((hf_dir / "config.json").read_text())
    if (found := raw.get("quantization_config")) is not None:
        # an unused language head may be there besides
        kept = set(found.get("modules_to_not_convert", ())) - {"lm_head"}
        alike = found | {"modules_to_not_convert": None} == made | {"modules_to_not_convert": None}
        if not alike or kept != set(made["modules_to_not_convert"]) - {"lm_head"}:
            raise ValueError(
                f"{hf_dir} is not quantised as rollout.quantization={config.quantization} is; give "
                "a directory that is, or one that is not at all"
            )
        return hf_dir

    def write() -> None:
        staging = staging_of(served)
        shutil.rmtree(staging, ignore_errors=True)
        hf_writer.copy_config(hf_dir, staging)
        marked = hf_writer.in_dialect(raw | {"quantization_config": made}, "4.57")
        (staging / "config.json").write_text(json.dumps(marked, indent=2) + "\n")
        replace_folder(staging, served)

    world.first(write)
    return served


def check_cut(config: schema.Rollout, model: Qwen3VLConfig) -> None:
    """ValueError if a server's ranks would get parts of blocks."""
    sizes = {
        "num_attention_heads * head_dim": model.num_heads * model.head_dim,
        # copies of a head where there are more ranks than heads
        "num_key_value_heads * head_dim": max(model.num_kv_heads, config.tensor) * model.head_dim,
    }
    if not model.num_experts:
        sizes["intermediate_size"] = model.intermediate_size
    # with expert parallelism ranks have whole experts
    elif not any(arg.partition("=")[0] in EXPERT_PARALLEL for arg in config.server_args):
        sizes["moe_intermediate_size"] = model.moe_intermediate_size
    for name, size in sizes.items():
        if size % (config.tensor * BLOCK):
            raise ValueError(
                f"rollout.quantization={config.quantization} needs {name}={size} to be a multiple "
                f"of {BLOCK} on each of rollout.tensor={config.tensor} GPUs; lower rollout.tensor, "
                "give the servers expert parallelism (rollout.server_args) if it is about experts, "
                "or leave rollout.quantization out"
            )
