"""AdamW over one model's shards, its learning-rate schedule, and where its state lies."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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

from model_providers.host_memory import on_host
from model_providers.qwen3_vl import Qwen3VLModel
from prism_megatron.config.schema import Optimizer


def build_optimizer(
    section: Optimizer, ddp: list[DistributedDataParallel], model: Qwen3VLModel
) -> Any:
    """megatron.core's distributed AdamW: main weights in fp32 and moments, each rank its shard."""
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
    for part in optimizer.chained_optimizers:
        if isinstance(part.optimizer, torch.optim.Adam | torch.optim.AdamW):
            _allocate_moments(part.optimizer)
        elif section.moments == "bfloat16":
            update_in_parts(part.optimizer, AT_ONCE)
    return optimizer


def update_in_parts(optimizer: torch.optim.Optimizer, elements: int) -> None:
    """Have `optimizer` update at most so many elements at a time, a single parameter at least.

    Transformer Engine's Adam expands BF16 moments to fp32, of all parameters of a group before it
    updates the first: 8 bytes a parameter, twice what BF16 saves. It counts the updates of a group
    in group["step"].
    """
    update = optimizer.step

    def in_parts() -> None:
        wholes = [
            (group, group["params"], group.get("step", 0)) for group in optimizer.param_groups
        ]
        for group, _, _ in wholes:
            group["params"] = []
        try:
            for group, parameters, done in wholes:
                for part in _parts(parameters, elements):
                    group["params"], group["step"] = part, done
                    update()
                group["params"] = []
        finally:
            for group, parameters, _ in wholes:
                group["params"] = parameters

    optimizer.step = in_parts  # type: ignore[method-assign, assignment]


def _parts(parameters: list[Tensor], elements: int) -> Iterator[list[Tensor]]:
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


def _allocate_moments(optimizer: torch.optim.Optimizer) -> None:
    """torch's Adam allocates its state at the first step, but megatron.core wants to find it when a
    checkpoint is loaded before that (DistributedOptimizer.state_dict), and a step count even on a
    rank that has nothing to train."""
    if not any(group["params"] for group in optimizer.param_groups):
        optimizer.state["nothing"] = {"step": torch.zeros(())}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.zeros(()),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }


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


class HostState:
    """Main weights and moments that are on the device only while they are used.

    Between two updates they lie in pinned host memory, so that activations have the device's; the
    tensors stay the same objects, without storage. Copies are ordered with the stream's other work
    and nobody waits for them.
    """

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._host: dict[Tensor, Tensor] = {}
        self._to_host()

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """What reads or changes the state runs inside."""
        for tensor, host in self._host.items():
            tensor.untyped_storage().resize_(host.nbytes)
            tensor.copy_(host, non_blocking=True)
        yield
        self._to_host()

    def values(self, tensor: Tensor) -> Tensor:
        """What one of them is after the last update, on the host."""
        return self._host.get(tensor, tensor)

    def _to_host(self) -> None:
        # a checkpoint that was loaded brought new tensors
        state = self._tensors()
        new = [tensor for tensor in state if tensor not in self._host]
        kept = self._host | dict(zip(new, on_host(new), strict=True))
        self._host = {tensor: kept[tensor] for tensor in state}
        for tensor, host in self._host.items():
            host.copy_(tensor, non_blocking=True)
            tensor.untyped_storage().resize_(0)

    def _tensors(self) -> list[Tensor]:
        """All but main weights that are the model's own, as a discriminator's fp32 head is."""
        found: list[Tensor] = []
        for part in self._optimizer.chained_optimizers:
            # of a rank that has nothing to train
            if part.is_stub_optimizer:
                continue
            for group in part.shard_fp32_from_float16_groups:
                found += group
            for moments in part.optimizer.state.values():
                found += [m for m in moments.values() if isinstance(m, Tensor) and m.dim()]
        return [tensor for tensor in found if tensor.nbytes]


def build_scheduler(section: Optimizer, optimizer: Any, steps: int) -> OptimizerParamScheduler:
    """Warm-up, then constant or cosine over `steps` updates."""
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
    )
