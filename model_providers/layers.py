"""Transformer layer specs for text and vision, from the backend's layers."""

from __future__ import annotations

from functools import partial
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import get_mlp_module_spec_for_backend
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
)
from torch import Tensor

from model_providers.experts import StackedExperts
from model_providers.router import SectionRouter

EXPERTS = partial(MoELayer, submodules=MoESubmodules(experts=StackedExperts, router=SectionRouter))
"""megatron.core's Mixture-of-Experts layer with our router and our experts."""


class DeepstackLayer(TransformerLayer):
    """A decoder layer after which a deepstack feature is added at the visual tokens.

    The features ride through the block as `context` [F, V, hidden], the argument that carries
    cross-attention states and that a decoder without cross-attention hands on untouched, so they
    are explicit inputs of activation recomputation and keep their gradients. `context_mask` [V]
    holds the rows of the hidden states that they belong to. Feature f of the F that were left
    before this chunk of layers belongs to decoder layer num_deepstack - F + f.
    """

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        hidden_states, features = super().forward(*args, **kwargs)
        if features is None:
            return hidden_states, None
        index = self.layer_number - 1 - self.config.num_deepstack + features.shape[0]
        if 0 <= index < features.shape[0]:
            rows = kwargs["context_mask"]
            hidden_states = hidden_states.index_add(0, rows, features[index].unsqueeze(1))
        # after the last one there is nothing to hand on, nor to recompute a gradient for
        return hidden_states, features if index + 1 < features.shape[0] else None


def decoder_block(
    config: TransformerConfig, layers: BackendSpecProvider, num_layers: int
) -> TransformerBlockSubmodules:
    """The text decoder's layers in one chunk, with its final norm."""
    spec = ModuleSpec(
        module=DeepstackLayer,
        submodules=_layer(
            config, layers, AttnMaskType.causal, layers.layer_norm(True, for_qk=True)
        ),
    )
    return TransformerBlockSubmodules(
        layer_specs=[spec] * num_layers, layer_norm=layers.layer_norm(rms_norm=True)
    )


def vision_block(
    config: TransformerConfig, layers: BackendSpecProvider
) -> TransformerBlockSubmodules:
    """The vision tower's layers; there is no final norm, the mergers bring their own."""
    spec = ModuleSpec(
        module=TransformerLayer,
        submodules=_layer(config, layers, AttnMaskType.no_mask, IdentityOp),
    )
    return TransformerBlockSubmodules(layer_specs=[spec] * config.num_layers, layer_norm=None)


def _layer(
    config: TransformerConfig, layers: BackendSpecProvider, mask: AttnMaskType, qk_norm: Any
) -> TransformerLayerSubmodules:
    fused = layers.fuse_layernorm_and_linear()
    norm = layers.layer_norm(rms_norm=config.normalization == "RMSNorm")
    moe = config.num_moe_experts is not None
    return TransformerLayerSubmodules(
        input_layernorm=IdentityOp if fused else norm,
        self_attention=ModuleSpec(
            module=SelfAttention,
            params={"attn_mask_type": mask},
            submodules=SelfAttentionSubmodules(
                linear_qkv=(
                    layers.column_parallel_layer_norm_linear()
                    if fused
                    else layers.column_parallel_linear()
                ),
                core_attention=layers.core_attention(),
                linear_proj=layers.row_parallel_linear(),
                q_layernorm=qk_norm,
                k_layernorm=qk_norm,
            ),
        ),
        self_attn_bda=get_bias_dropout_add,
        pre_mlp_layernorm=IdentityOp if fused and not moe else norm,
        mlp=EXPERTS if moe else get_mlp_module_spec_for_backend(layers),
        mlp_bda=get_bias_dropout_add,
        # norms are saved under the names that the fused layers give them, so that a checkpoint
        # loads on every backend
        sharded_state_dict_keys_map={}
        if fused
        else {
            "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
            **({} if moe else {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}),
        },
    )
