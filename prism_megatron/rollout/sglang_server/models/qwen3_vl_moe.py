"""SGLang's Qwen3-VL with experts, which takes a layer's fused experts in one copy, by
SGLANG_EXTERNAL_MODEL_PACKAGE.

SGLang's own load_weights turns them, calls a loader for every expert and half of it, and lists all
parameters of the model each time, which takes longer than everything else in a sync.
"""

from itertools import chain

import torch
from sglang.srt.eplb.expert_location import get_global_expert_location_metadata
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.quantization.unquant import UnquantizedFusedMoEMethod
from sglang.srt.layers.utils import get_layer_id
from sglang.srt.models import qwen3_vl_moe

from prism_megatron.rollout import fused_experts


class Qwen3VLMoeForConditionalGeneration(qwen3_vl_moe.Qwen3VLMoeForConditionalGeneration):
    """Of SGLang's name, in whose place it is registered."""

    def load_weights(self, weights):
        """What SGLang's takes, and what fused_experts.sent_name names."""
        others = self._load_fused(weights)
        first = next(others, None)
        if first is not None:
            super().load_weights(chain([first], others))

    def _load_fused(self, weights):
        """Load fused experts that were sent; the rest as SGLang's loader takes it."""
        for name, tensor in weights:
            if fused_experts.hf_name(name) == name or not self._load_share(name, tensor):
                yield from fused_experts.as_stored(name, tensor)

    def _load_share(self, name, tensor):
        """Whether this rank holds its share as it was sent, and has copied it."""
        layer = get_layer_id(name)
        if self.config.encoder_only or not self.model.start_layer <= layer < self.model.end_layer:
            return False
        experts = self.model.layers[layer].mlp.experts
        if not _holds_as_sent(experts):
            return False
        parameter = experts.w13_weight if ".w13_weight" in name else experts.w2_weight
        ep = experts.moe_ep_rank, experts.moe_ep_size
        tp = experts.moe_tp_rank, experts.moe_tp_size
        return fused_experts.load_share(parameter, name, tensor, ep, tp)


def _holds_as_sent(experts):
    """Whether FusedMoE.weight_loader would copy each expert to its own place, unturned, gate before
    up and nothing padded: not so for other layers, quantised ones, some MoE runners, and experts
    that were moved or doubled to balance load."""
    method, location = experts.quant_method, get_global_expert_location_metadata()
    return (
        type(experts) is FusedMoE
        and type(method) is UnquantizedFusedMoEMethod
        and not experts.use_presharded_weights
        and not experts.num_fused_shared_experts
        and not experts.use_triton_kernels  # triton_kernel: turned
        # flashinfer_trtllm and its routed kind: other order and blocks; CPU, AITER: padded
        and not experts.use_padded_loading
        and not method.load_up_proj_weight_first  # flashinfer_cutlass: up before gate
        and (location is None or _in_order(location.physical_to_logical_map_cpu[experts.layer_id]))
    )


def _in_order(numbers):
    return torch.equal(numbers, torch.arange(len(numbers)))


EntryClass = Qwen3VLMoeForConditionalGeneration
