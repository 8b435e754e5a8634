"""AdamW over one model's shards, and its learning-rate schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import (
    OptimizerConfig,
    ParamKey,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.optimizer_config import ParamPredicate
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler, ParamGroupOverride
from torch import Tensor

from model_providers.qwen3_vl import Qwen3VLModel
from prism_megatron.config.schema import Optimizer


def build_optimizer(
    section: Optimizer, ddp: list[DistributedDataParallel], model: Qwen3VLModel
) -> Any:
    """megatron.core's distributed AdamW: main weights in fp32 and moments, each rank its shard.
    With section.offload the moments are HostState's to allocate.
    """
    config = OptimizerConfig(
        optimizer="adam",
        lr=section.lr,
        min_lr=0.0,
        weight_decay=section.weight_decay,
        adam_beta1=section.betas[0],
        adam_beta2=section.betas[1],
        adam_eps=section.eps,
        clip_grad=section.clip_grad,
        bf16=model.backend.dtype is torch.bfloat16,
        params_dtype=model.backend.dtype,
        use_distributed_optimizer=True,
        **(_HALF_MOMENTS if section.moments == "bfloat16" else {}),
    )
    # The fp32 head of a BF16 model gets a parameter group of its own, which any override makes,
    # even of the rate by itself. DistributedOptimizer numbers a group's parameters buffer by buffer
    # (_build_optimizer_group_ranges) and hands them to Adam fp32 first
    # (_build_model_and_main_param_groups), so in a group of two dtypes a checkpoint would mix up
    # whose moments are whose.
    other_dtype = ParamPredicate("other_dtype", lambda p: p.dtype != model.backend.dtype)
    overrides = get_standard_config_overrides(config)
    overrides[ParamKey(predicate=other_dtype)] = ParamGroupOverride(max_lr=section.lr)
    optimizer = get_megatron_optimizer(
        config,
        ddp,
        config_overrides=overrides,
        use_gloo_process_groups=False,
        pg_collection=model.parallel.groups,
    )
    for part in (p for p in optimizer.chained_optimizers if not p.is_stub_optimizer):
        if section.offload:
            continue
        parameters = [p for group in part.optimizer.param_groups for p in group["params"]]
        for parameter in parameters:
            allocate_moments(part.optimizer, parameter)
        if section.moments == "bfloat16":
            parts = list(in_parts(parameters, AT_ONCE))
            update_in_parts(part.optimizer, lambda parts=parts: parts)
    return optimizer


def update_in_parts(
    optimizer: torch.optim.Optimizer, parts: Callable[[], Iterable[list[Tensor]]]
) -> None:
    """Have an update of `optimizer` be one of each of the `parts` that its parameters are cut into.

    Transformer Engine's Adam expands BF16 moments to fp32, of all parameters of a group before it
    updates the first: 8 bytes a parameter, twice what BF16 saves. It counts the updates of a group
    in group["step"].
    """
    update = optimizer.step

    def by_parts() -> None:
        wholes = [
            (group, group["params"], group.get("step", 0)) for group in optimizer.param_groups
        ]
        try:
            for part in parts():
                chosen = {id(parameter) for parameter in part}
                for group, parameters, done in wholes:
                    group["params"] = [p for p in parameters if id(p) in chosen]
                    if group["params"]:
                        group["step"] = done
                if chosen:
                    update()
        finally:
            for group, parameters, _ in wholes:
                group["params"] = parameters

    optimizer.step = by_parts  # type: ignore[method-assign, assignment]


def in_parts(parameters: Iterable[Tensor], elements: int) -> Iterator[list[Tensor]]:
    """The parameters in their order, as many together as have `elements`, or one."""
    part, count = list[Tensor](), 0
    for parameter in parameters:
        if part and count + parameter.numel() > elements:
            yield part
            part, count = [], 0
        part.append(parameter)
        count += parameter.numel()
    if part:
        yield part


def allocate_moments(optimizer: Any, parameter: Tensor) -> None:
    """What torch's and Transformer Engine's Adam do in the first update, for a checkpoint that is
    loaded before."""
    if isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):
        optimizer.state[parameter] = {
            "step": torch.zeros(()),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    else:
        optimizer.initialize_state(parameter, store_param_remainders=False)


def update(optimizer: Any, grad_norm: float) -> bool:
    """Clip the gradients, whose norm is known, and make the update; False if there was none.

    Optimizer.step of megatron.core prepares them and finds their norm itself, a second time here.
    """
    for part in optimizer.chained_optimizers:
        parameters = part.get_parameters()
        if parameters and part.config.clip_grad > 0:
            clip_grad_by_total_norm_fp32(
                parameters,
                part.config.clip_grad,
                grad_norm,
                use_decoupled_grad=part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8,
            )
    updated: bool = optimizer.step_with_ready_grads()
    return updated


AT_ONCE = 2**28
"""Elements that are updated at a time where moments are in BF16: 2 GiB of both in fp32."""
_HALF_MOMENTS = dict(
    use_precision_aware_optimizer=True,
    exp_avg_dtype=torch.bfloat16,
    exp_avg_sq_dtype=torch.bfloat16,
    # Any name but "delayed" leaves the main weights to megatron.core, as with fp32 moments;
    # otherwise Transformer Engine keeps them, as remainders, which a checkpoint does not restore.
    # Nothing else reads it.
    fp8_recipe="tensorwise",
)


def build_scheduler(section: Optimizer, optimizer: Any, steps: int) -> OptimizerParamScheduler:
    """Warm-up, then constant or cosine over `steps` updates; a checkpoint's is that of the section,
    too, but for where it is."""
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=section.lr,
        min_lr=0.0,
        lr_warmup_steps=section.warmup_steps,
        # one more, so that a cosine's last step still moves
        lr_decay_steps=max(steps, section.warmup_steps) + 1,
        lr_decay_style=section.schedule,
        start_wd=section.weight_decay,
        end_wd=section.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
