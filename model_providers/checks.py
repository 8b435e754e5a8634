"""Whether a model can be built and trained as asked: errors that name the numbers, before any
collective.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.moe.fused_a2a import HAVE_DEEP_EP, HAVE_HYBRIDEP

from model_providers.architecture import Qwen3VLConfig
from model_providers.backend import Abilities
from model_providers.config import Dispatcher, Recompute, TrainingOptions
from model_providers.parallel import Layout


def check_model(
    config: Qwen3VLConfig, layout: Layout, options: TrainingOptions, backend: Abilities
) -> None:
    """ValueError if a backend of these abilities can't lay this model out and train it so."""
    check_layout(config, layout)
    dtype = torch.float8_e4m3fn if options.precision.fp8 else backend.dtype
    check_experts(config, layout, dtype)
    check_recompute(config, options.recompute, backend)
    check_offload(config, options.offload_layers, layout, options.recompute, backend)
    check_dispatcher(config, options.dispatcher, layout, backend)
    options.precision.check(backend, config, layout, options.recompute)


def check_layout(config: Qwen3VLConfig, layout: Layout) -> None:
    """ValueError if this model can't be split as `layout` says, before any collective."""
    for name in ("tensor", "expert", "expert_tensor", "context", "pipeline", "virtual_pipeline"):
        if (size := getattr(layout, name)) < 1:
            raise ValueError(f"{name}={size} is no size; give 1 or more")
    divisible = {
        "attention heads": (config.num_heads, layout.tensor),
        "key-value heads": (config.num_kv_heads, layout.tensor),
        "vision heads": (config.vision.num_heads, layout.vision_tensor),
        "vision feed-forward size": (config.vision.intermediate_size, layout.vision_tensor),
    }
    if config.num_experts:
        divisible["experts"] = (config.num_experts, layout.expert)
        divisible["expert feed-forward size"] = (
            config.moe_intermediate_size,
            layout.expert_tensor,
        )
    else:
        divisible["feed-forward size"] = (config.intermediate_size, layout.tensor)
        if layout.expert > 1:
            raise ValueError(
                f"expert parallel size {layout.expert}, but the model is dense; set it to 1"
            )
    for what, (number, parts) in divisible.items():
        if number % parts:
            way_out = ", or vision=replicated" if what.startswith("vision") else ""
            raise ValueError(
                f"{number} {what} can't be split in {parts}; choose sizes that divide {number}"
                f"{way_out}"
            )
    if config.num_experts and layout.tensor > 1 and not layout.sequence_parallel:
        raise ValueError(
            "experts with tensor parallelism need sequence parallelism; set sequence=true"
        )
    _check_stages(config, layout)


def check_experts(config: Qwen3VLConfig, layout: Layout, dtype: torch.dtype) -> None:
    """ValueError if the kernel that computes all experts at once can't read rows of this length in
    the dtype that it multiplies."""
    if not config.num_experts:
        return
    size = dtype.itemsize
    features = config.moe_intermediate_size // layout.expert_tensor
    for what, number in (("hidden size", config.hidden_size), ("expert features a rank", features)):
        if number * size % 16:
            raise ValueError(
                f"{what} {number} in {dtype} are {number * size} bytes, and experts are computed "
                f"in pieces of 16 bytes; choose a multiple of {16 // size}"
            )


def check_recompute(config: Qwen3VLConfig, recompute: Recompute, backend: Abilities) -> None:
    """ValueError if the backend or this model has no such module to compute again."""
    asked = set(recompute.modules)
    if missing := asked - backend.recompute_modules:
        raise ValueError(
            f"backend {backend.name!r} can't recompute {', '.join(sorted(missing))}; choose "
            f"from {', '.join(sorted(backend.recompute_modules))}"
        )
    foreign = asked & ({"mlp"} if config.num_experts else {"moe", "moe_act"})
    if foreign:
        kind = "Mixture-of-Experts" if config.num_experts else "dense"
        raise ValueError(
            f"recompute.modules has {', '.join(sorted(foreign))}, which a {kind} model does "
            "not have; remove it"
        )


def check_offload(
    config: Qwen3VLConfig, layers: int, layout: Layout, recompute: Recompute, backend: Abilities
) -> None:
    """ValueError if the activations of so many decoder layers can't lie in host memory."""
    if not layers:
        return
    if not backend.activation_offload:
        raise ValueError(
            f"offload_layers={layers} moves activations from a GPU to the host, and backend "
            f"{backend.name!r} has none; leave it out or choose backend=cuda"
        )
    if layout.pipeline > 1 or recompute.granularity != "none":
        raise ValueError(
            f"offload_layers={layers} with pipeline={layout.pipeline} and "
            f"recompute.granularity={recompute.granularity}: Transformer Engine offloads one "
            "micro-batch at a time, and nothing that is computed again; set pipeline to 1 and "
            "granularity to none, or leave offload_layers out"
        )
    if layers >= config.num_layers:
        raise ValueError(
            f"offload_layers={layers}, but the last of {config.num_layers} decoder layers is "
            f"needed again at once; set it to {config.num_layers - 1} or less"
        )


def check_dispatcher(
    config: Qwen3VLConfig, dispatcher: Dispatcher, layout: Layout, backend: Abilities
) -> None:
    """ValueError if tokens can't be sent to this model's experts so."""
    if dispatcher == "alltoall":
        return
    if backend.moe_dispatcher != "alltoall":
        raise ValueError(
            f"dispatcher={dispatcher!r} needs GPUs; backend {backend.name!r} gathers all "
            "tokens on every rank, so leave it out or choose backend=cuda"
        )
    if layout.expert * layout.expert_tensor == 1 or not config.num_experts:
        raise ValueError(
            f"dispatcher={dispatcher!r} sends tokens to experts on other ranks, but there are "
            f"{config.num_experts} experts at expert={layout.expert}, expert_tensor="
            f"{layout.expert_tensor}; leave it out or spread experts over ranks"
        )


def check_installed(dispatcher: Dispatcher) -> None:
    """ValueError if this environment does not have the dispatcher's kernels."""
    if not {"alltoall": True, "deepep": HAVE_DEEP_EP, "hybridep": HAVE_HYBRIDEP}[dispatcher]:
        raise ValueError(
            f"dispatcher={dispatcher!r} needs DeepEP with its kernels for it, which can't be "
            "imported; install it from github.com/deepseek-ai/DeepEP (branch hybrid-ep for "
            "hybridep) or leave dispatcher out"
        )


def _check_stages(config: Qwen3VLConfig, layout: Layout) -> None:
    """megatron.core's rules for spreading layers over stages, before it meets them itconfig."""
    ends = {
        name: size
        for name in ("first_stage_layers", "last_stage_layers")
        if (size := getattr(layout, name)) is not None
    }
    extra = [n for n in ("embedding_as_layer", "loss_as_layer") if getattr(layout, n)]
    chunks = layout.virtual_pipeline
    asked = [*ends, *extra, *["virtual_pipeline"] * (chunks > 1)]
    if layout.pipeline == 1 and asked:
        raise ValueError(
            f"{' and '.join(asked)} can't be set with a single pipeline stage; raise pipeline"
        )
    if ends and extra:
        raise ValueError(
            f"{' and '.join([*ends, *extra])} can't be set together; set the stages' layers or "
            "count embedding and loss as layers, not both"
        )
    for name, size in ends.items():
        if size < 1 or size % chunks:
            raise ValueError(
                f"{name}={size} decoder layers can't be split in {chunks} virtual stages; "
                f"choose a multiple of {chunks} above 0"
            )
    layers = config.num_layers - sum(ends.values()) + len(extra)
    stages = layout.pipeline - len(ends)
    parts = stages * chunks
    counted = f"{config.num_layers} decoder layers"
    if extra:
        counted += f", with {' and '.join(extra)} {layers},"
    if ends:
        counted += f", {layers} of them outside of {' and '.join(ends)},"
    if layers if parts == 0 else layers < 1 or layers % parts:
        raise ValueError(
            f"{counted} can't be split in {parts} ({stages} pipeline stages with {chunks} "
            "virtual stages each); choose sizes that divide, set first_stage_layers and "
            "last_stage_layers, or count embedding_as_layer and loss_as_layer"
        )
