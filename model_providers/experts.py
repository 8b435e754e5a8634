"""The experts of a layer: one parameter a linear layer, and one kernel for all experts that a rank
holds.

    tokens, expert by expert [T, hidden] --fc1--> gate and up --silu(gate) * up * p--> --fc2--> out

megatron.core's grouped experts are a parameter an expert. Whatever is done by parameter, such as
calling a kernel, accumulating a gradient or looking at what may be reduced, then costs the host its
time for every expert: with 64 on a rank more time than the device needs to compute them. In FP8 the
products are those of fp8_experts.py.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.fusions.fused_bias_swiglu import weighted_bias_swiglu_impl
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import CheckpointWithoutOutput
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn


class StackedLinear(nn.Module):
    """A linear layer without bias for each of this rank's experts, weight [experts, out, in].

    Tensor-parallel ranks hold a part of the outputs (dim 1) or of the inputs (dim 2).
    """

    def __init__(
        self, config: TransformerConfig, shape: tuple[int, int, int], split_dim: int
    ) -> None:
        super().__init__()
        # as megatron.core's layers do; None is where the model is built, which may be "meta"
        device = None if config.use_cpu_initialization else torch.accelerator.current_accelerator()
        self.weight = nn.Parameter(torch.empty(shape, dtype=config.params_dtype, device=device))
        set_tensor_model_parallel_attributes(self.weight, True, split_dim, 1)
        # whether the ranks that hold the same are others than those of the dense layers
        own_groups = (
            config.expert_model_parallel_size > 1
            or config.expert_tensor_parallel_size != config.tensor_model_parallel_size
        )
        self.weight.allreduce = not own_groups  # type: ignore[attr-defined]
        self.product = grouped_product
        if config.fp8:
            # Triton, which only a GPU has
            from model_providers import fp8_experts

            self.product = fp8_experts.grouped_product

    def forward(self, tokens: Tensor, ends: Tensor) -> Tensor:
        """See grouped_product."""
        return self.product(tokens, self.weight, ends)


def grouped_product(tokens: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """tokens [T, in] expert by expert, weight [experts, out, in], ends [experts] int32: where the
    tokens of each end -> [T, out]."""
    return F.grouped_mm(tokens, weight.transpose(1, 2), offs=ends)


class StackedExperts(MegatronModule):
    """The experts of this rank; in checkpoints they are what megatron.core's are."""

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        name: str | None = None,
    ) -> None:
        super().__init__(config=config)
        self.groups = pg_collection
        features = config.moe_ffn_hidden_size // pg_collection.expt_tp.size()
        hidden = config.hidden_size
        self.linear_fc1 = StackedLinear(config, (num_local_experts, 2 * features, hidden), 1)
        self.linear_fc2 = StackedLinear(config, (num_local_experts, hidden, features), 2)
        self.recomputed = (
            config.recompute_granularity == "selective" and "moe_act" in config.recompute_modules
        )

    def forward(self, tokens: Tensor, counts: Tensor, weights: Tensor) -> tuple[Tensor, None]:
        """tokens [T, hidden], expert by expert; counts [experts] of them; weights [T] that the
        router gives each -> [T, hidden], and that there is no bias."""
        ends = counts.cumsum(0).to(tokens.device, torch.int32, non_blocking=True)
        both = self.linear_fc1(tokens, ends)
        if not self.recomputed:
            return self.linear_fc2(self._activate(both, weights), ends), None
        checkpoint = CheckpointWithoutOutput()
        out = self.linear_fc2(checkpoint.checkpoint(self._activate, both, weights), ends)
        checkpoint.discard_output_and_register_recompute(out)
        return out, None

    def _activate(self, both: Tensor, weights: Tensor) -> Tensor:
        """gate and up [T, 2 * features] -> silu(gate) * up * weight [T, features]."""
        if self.config.bias_activation_fusion:
            fused: Tensor = weighted_bias_swiglu_impl(both, None, weights.unsqueeze(-1))
            return fused
        gate, up = both.chunk(2, dim=-1)
        return (F.silu(gate) * up * weights.unsqueeze(-1)).to(both.dtype)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: Any = None
    ) -> dict[str, Any]:
        """The weights where megatron.core has its own (TEGroupedMLP.sharded_state_dict): an axis
        for the layer, one for the expert, then an expert's own. One piece a rank, but for gate and
        up of ranks that split them, which lie apart in the whole."""
        expert, tensor, data = self.groups.ep, self.groups.expt_tp, self.groups.expt_dp
        axis, experts = len(sharded_offsets), self.linear_fc1.weight.shape[0]
        replica = (0, 0, data.rank())

        def piece(key: str, values: Tensor, number: int, of: int, *split: Any) -> ShardedTensor:
            return ShardedTensor.from_rank_offsets(
                key,
                values,
                *sharded_offsets,
                (axis, number, of),
                *split,
                replica_id=replica,
                # a single expert's values lack its axis
                prepend_axis_num=axis + 3 - values.dim(),
            )

        def halves(key: str, values: Tensor, *unused: Any) -> list[ShardedTensor]:
            """Gate and up of each expert."""
            found = []
            for index, both in enumerate(values):
                at = (expert.rank() * experts + index, expert.size() * experts)
                whole = piece(key, both, *at, (axis + 1, tensor.rank(), tensor.size()))
                found += apply_swiglu_sharded_factory(
                    whole, (*sharded_offsets, (axis, *at))
                ).build()
            return found

        def merge(loaded: list[Tensor]) -> Tensor:
            return torch.cat(loaded).view_as(self.linear_fc1.weight)

        found: dict[str, Any] = {}
        for name, linear in self.named_children():
            key, weight = f"{prefix}experts.{name}.weight", linear.weight
            if name == "linear_fc1" and tensor.size() > 1:
                stored: Any = ShardedTensorFactory(key, weight, halves, merge, replica)
            else:
                split = (axis + 2, tensor.rank(), tensor.size())
                stored = piece(key, weight, expert.rank(), expert.size(), split)
            found[f"{prefix}{name}.weight"] = stored
        return found
