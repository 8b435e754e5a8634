"""Gradients are reduced while the backward pass still runs, in one order on every rank."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn


def reduce_in_order(bucket_groups: list[Any]) -> None:
    """Let megatron.core's gradient buckets start their reduction in the order of the list only.

    megatron.core starts a bucket's reduction when the last of its gradients is there. Ranks whose
    last micro-batches use different parts of the model, as where one encodes no image, would start
    in different orders or not at all, and hang. Here a bucket waits for the ones before it; what
    the backward pass left over is started at its end (finish_grad_sync), in the same order.
    """
    seen: list[set[nn.Parameter]] = [set() for _ in bucket_groups]

    def ready(index: int, parameter: nn.Parameter, force_all_reduce: bool | None = False) -> None:
        group = bucket_groups[index]
        if not group.is_last_microbatch:
            return
        seen[index].add(parameter)
        for number, each in enumerate(bucket_groups):
            if each.grad_reduce_handle is not None:
                continue
            if len(seen[number]) < len(each.params):
                return
            each.start_grad_sync(force_all_reduce=force_all_reduce)

    def finish(index: int, original: Any, **options: Any) -> None:
        seen[index].clear()
        original(**options)

    for index, group in enumerate(bucket_groups):
        # megatron.core learns from the first step which gradients to wait for. It never learns
        # here, and as in its first step, finishing starts what has not been started.
        group.register_grad_ready = partial(ready, index)
        group.finish_grad_sync = partial(finish, index, group.finish_grad_sync)
