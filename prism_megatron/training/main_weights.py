"""What the optimizer trains, read in the place of weights that the model holds rounded to FP8.

Main weights are in fp32 and spread over the data-parallel ranks. Read here they are whole, rounded
to BF16 alone: an export, a sync to engines or a checkpoint has what it would have without
fp8_param_gather, not the few bits that the model computes with.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model_providers.fp8_weights import is_rounded
from prism_megatron.training.host_state import HostState


class MainWeights:
    """Read of a WeightPlan; the data-parallel ranks read together and in the same order."""

    def __init__(self, optimizer: Any, host: HostState | None) -> None:
        """optimizer: megatron.core's; host: where its state lies between updates, if there."""
        self._host = host
        self._groups: dict[nn.Parameter, dist.ProcessGroup] = {}
        self._shards: dict[nn.Parameter, tuple[int, Tensor]] = {}
        for part in optimizer.chained_optimizers:
            if part.is_stub_optimizer:
                continue
            for buffer in part.buffers:
                self._groups |= dict.fromkeys(buffer.params, part.data_parallel_group)
            for parameters, shards in zip(
                part.model_float16_groups, part.shard_fp32_from_float16_groups, strict=True
            ):
                for parameter, shard in zip(parameters, shards, strict=True):
                    start = part._get_model_param_range_map(parameter)["param"].start
                    self._shards[parameter] = start, shard

    def read(self, parameter: nn.Parameter) -> Tensor:
        """The parameter's values; of one in FP8 its main weights."""
        return self.whole(parameter) if is_rounded(parameter) else parameter.detach()

    def whole(self, parameter: nn.Parameter) -> Tensor:
        """The parameter's main weights in its own type."""
        found = torch.zeros(parameter.shape, dtype=parameter.dtype, device=parameter.device)
        if parameter in self._shards:
            start, shard = self._shards[parameter]
            if self._host is not None:
                shard = self._host.values(shard)
            found.view(-1)[start : start + shard.numel()].copy_(shard)
        # each value is on one rank, and zero on the others
        dist.all_reduce(found, group=self._groups[parameter])
        return found
