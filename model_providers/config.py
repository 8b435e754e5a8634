"""How a model is built and trained, and what megatron.core is told of it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from model_providers.architecture import SECTIONS, Qwen3VLConfig
from model_providers.backend import Abilities, Backend
from model_providers.parallel import Layout

Dispatcher = Literal["alltoall", "deepep", "hybridep"]
"""How tokens get to experts on other ranks: NCCL's all-to-all, or kernels of their own."""


@dataclass(frozen=True)
class Recompute:
    """Activations that the backward pass computes again instead of keeping them."""

    granularity: Literal["none", "selective", "full"] = "none"
    """Of the decoder: nothing, some modules of each layer, or whole layers."""
    modules: tuple[str, ...] = ()
    """What selective computes again, in megatron.core's names (recompute_modules)."""
    layers: int | None = None
    """How many decoder layers of each (virtual) stage full computes again; None: all."""
    vision: bool = False
    """Every layer of the vision tower."""


FP8Recipe = Literal["delayed", "tensorwise", "blockwise"]
"""Transformer Engine's scaling: by a history of maxima, by the tensor's own maximum, or by the
maxima of 1 x 128 (activations) and 128 x 128 (weights) blocks."""


@dataclass(frozen=True)
class Precision:
    """What the decoder's matrix products compute in; vision tower, router and heads stay in the
    backend's dtype."""

    fp8: FP8Recipe | None = None
    """E4M3 forward, E5M2 gradients; None computes in the backend's dtype. Experts' products are the
    same in every recipe (fp8_experts.py)."""
    bf16_first_layers: int = 0
    """Decoder layers at the start that are left out of FP8."""
    bf16_last_layers: int = 0
    """Decoder layers at the end that are left out of FP8."""
    param_gather: bool = False
    """The weights of these products are held in FP8 too; fp32 main weights are in the optimizer."""

    @property
    def row_multiple(self) -> int:
        """What the tokens of a rank's row must be a multiple of: FP8 products need 16, blockwise
        scaling whole blocks."""
        return {None: 1, "blockwise": 128}.get(self.fp8, 16)

    def check(
        self, backend: Abilities, config: Qwen3VLConfig, layout: Layout, recompute: Recompute
    ) -> None:
        """ValueError if backend, model or layout can't compute so, or recompute it."""
        if self.fp8 is None:
            if self.bf16_first_layers or self.bf16_last_layers:
                raise ValueError(
                    "bf16_first_layers and bf16_last_layers mean something with fp8 only"
                )
            if self.param_gather:
                raise ValueError(
                    "fp8_param_gather holds weights as fp8 computes with them, but fp8 is null; "
                    "set fp8 to tensorwise or blockwise, or leave fp8_param_gather out"
                )
            return
        if not backend.fp8:
            raise ValueError(
                f"fp8={self.fp8!r} needs Transformer Engine on a GPU; backend {backend.name!r} has "
                "none, so leave fp8 out or choose backend=cuda"
            )
        if self.fp8 == "delayed" and (self.bf16_first_layers or self.bf16_last_layers):
            raise ValueError(
                "fp8='delayed' collects its maxima over all layers and can't leave some in BF16; "
                "choose tensorwise or blockwise, or set bf16_first_layers and bf16_last_layers to 0"
            )
        if self.fp8 == "delayed" and self.param_gather:
            raise ValueError(
                "fp8_param_gather rounds weights when they are loaded, but fp8='delayed' knows no "
                "scale to round by before the first steps, and most of them would be lost; choose "
                "tensorwise or blockwise, or leave fp8_param_gather out"
            )
        if self.fp8 == "delayed" and layout.pipeline > 1:
            raise ValueError(
                "fp8='delayed' reduces its maxima over all ranks in one call, which pipeline "
                f"stages (pipeline={layout.pipeline}) reach with different layers; choose "
                "tensorwise or blockwise"
            )
        outside = {"layernorm", "moe_act"} & set(recompute.modules)
        if self.fp8 == "delayed" and outside:
            raise ValueError(
                f"recompute.modules has {', '.join(sorted(outside))}, whose outputs fp8='delayed' "
                "can't compute again; choose tensorwise or blockwise, or remove it"
            )
        most = config.num_layers // layout.pipeline
        for name in ("bf16_first_layers", "bf16_last_layers"):
            if (number := getattr(self, name)) > most:
                raise ValueError(
                    f"{name}={number}, but a pipeline stage has {most} of {config.num_layers} "
                    f"decoder layers and megatron.core leaves out at most these; set {name} to "
                    f"{most} or less, or leave fp8 out"
                )

    def transformer_fields(self) -> dict[str, Any]:
        """The same as megatron.core's configuration says it."""
        if self.fp8 is None:
            return {}
        return dict(
            fp8="hybrid",
            fp8_recipe=self.fp8,
            fp8_param=self.param_gather,
            fp8_amax_history_len=1024,
            fp8_amax_compute_algo="max",
            first_last_layers_bf16=bool(self.bf16_first_layers or self.bf16_last_layers),
            num_layers_at_start_in_bf16=self.bf16_first_layers,
            num_layers_at_end_in_bf16=self.bf16_last_layers,
        )


@dataclass(frozen=True)
class TrainingOptions:
    """What the modules themselves must know of how they are trained.

    aux_loss_coef weighs the experts' load-balancing loss of a step, averaged over layers, whose
    balanced value is top_k as in transformers' load_balancing_loss_func; z_loss_coef the squared
    logsumexp of the router's logits (ST-MoE, arXiv:2202.08906), averaged over tokens and layers.
    offload_layers: decoder layers, the first ones, whose activations lie in host memory until their
    backward pass.
    entropy: what the language head says in training beside log-probabilities: nothing, the entropy
    of each token's distribution as a number (metric), or with a gradient (loss). score_dtype: what
    the score head computes in.
    """

    aux_loss_coef: float = 0.0
    z_loss_coef: float = 0.0
    recompute: Recompute = Recompute()
    offload_layers: int = 0
    precision: Precision = Precision()
    dispatcher: Dispatcher = "alltoall"
    entropy: Literal["none", "metric", "loss"] = "none"
    score_dtype: torch.dtype = torch.float32


DEFAULT_OPTIONS = TrainingOptions()


def stage_layers(config: Qwen3VLConfig, layout: Layout, stage: int, chunk: int = 0) -> range:
    """Decoder layers, from 0, that pipeline stage `stage` holds in its virtual stage `chunk`.

    megatron.core's own allocation, so a layout that it refuses raises its error here;
    checks.check_layout says the same in our words.
    """
    # what else a layout says has no part in it
    stages = Layout(
        pipeline=layout.pipeline,
        virtual_pipeline=layout.virtual_pipeline,
        first_stage_layers=layout.first_stage_layers,
        last_stage_layers=layout.last_stage_layers,
        embedding_as_layer=layout.embedding_as_layer,
        loss_as_layer=layout.loss_as_layer,
    )
    return _allocation(config.num_layers, stages)[stage][chunk]


@cache
def _allocation(num_layers: int, layout: Layout) -> list[list[range]]:
    """The layers of every stage and chunk."""
    # width and precision have no part in it
    plan = TransformerConfig(
        num_layers=num_layers,
        hidden_size=1,
        num_attention_heads=1,
        pipeline_dtype=torch.float32,
        **_pipeline(layout),
    )

    def layers(stage: int, chunk: int) -> range:
        virtual = chunk if layout.virtual_pipeline > 1 else None
        first = get_transformer_layer_offset(plan, virtual, stage)
        return range(first, first + get_num_layers_to_build(plan, virtual, stage))

    chunks = range(layout.virtual_pipeline)
    return [[layers(stage, chunk) for chunk in chunks] for stage in range(layout.pipeline)]


@dataclass
class TextTransformerConfig(TransformerConfig):
    """megatron.core's configuration of the decoder, plus what its deepstack layers need."""

    num_deepstack: int = 0
    """Features that ride along: feature i is added after decoder layer i."""
    expert_sections: int = 1
    """Sections that the experts are divided among."""


def _dispatch(dispatcher: Dispatcher, backend: Backend) -> dict[str, Any]:
    if dispatcher == "alltoall":
        return dict(moe_token_dispatcher_type=backend.moe_dispatcher)
    return dict(moe_token_dispatcher_type="flex", moe_flex_dispatcher_backend=dispatcher)


def text_transformer_config(
    config: Qwen3VLConfig, layout: Layout, backend: Backend, options: TrainingOptions
) -> TextTransformerConfig:
    """The decoder as megatron.core sees it.

    Its router losses are summed over layers, and its balanced load-balancing loss is 1 a layer,
    hence the factors.
    """
    experts: dict[str, Any] = {}
    if config.num_experts:
        experts = dict(
            num_moe_experts=config.num_experts,
            moe_router_topk=config.top_k,
            moe_ffn_hidden_size=config.moe_intermediate_size,
            moe_router_load_balancing_type="aux_loss" if options.aux_loss_coef else "none",
            moe_aux_loss_coeff=options.aux_loss_coef * config.top_k / config.num_layers,
            moe_z_loss_coeff=options.z_loss_coef / config.num_layers or None,
            moe_router_dtype="fp32",
            **_dispatch(options.dispatcher, backend),
            # megatron.core asks for it where activations of experts are computed again
            moe_grouped_gemm=backend.fused_kernels,
            moe_permute_fusion=backend.fused_kernels,
            moe_router_fusion=backend.fused_kernels,
        )
    transformer = TextTransformerConfig(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_heads,
        num_query_groups=config.num_kv_heads,
        kv_channels=config.head_dim,
        ffn_hidden_size=config.moe_intermediate_size or config.intermediate_size,
        normalization="RMSNorm",
        layernorm_epsilon=config.rms_norm_eps,
        qk_layernorm=True,
        gated_linear_unit=True,
        activation_func=F.silu,
        bias_activation_fusion=backend.fused_kernels,
        add_bias_linear=False,
        num_deepstack=config.num_deepstack,
        expert_sections=len(SECTIONS) if config.dedicated else 1,
        sequence_parallel=layout.sequence_parallel,
        **experts,
        **_recompute(options.recompute),
        # of Transformer Engine's, which knows layers and not micro-batches
        cpu_offloading=bool(options.offload_layers),
        cpu_offloading_num_layers=options.offload_layers,
        **options.precision.transformer_fields(),
        **_pipeline(layout),
        **_common(layout, backend),
    )
    if layout.pipeline > 1:
        # packed rows differ in length from one micro-batch to the next. Set after construction:
        # megatron.core refuses it with the allgather dispatcher, whose ranks here hold rows of
        # equal length by construction (data/packing.py pads them).
        transformer.variable_seq_lengths = True
    return transformer


def _recompute(recompute: Recompute) -> dict[str, Any]:
    if recompute.granularity == "none":
        return {}
    found: dict[str, Any] = dict(recompute_granularity=recompute.granularity)
    if recompute.granularity == "selective":
        return found | dict(recompute_modules=[*recompute.modules])
    if recompute.layers is None:
        return found | dict(recompute_method="uniform", recompute_num_layers=1)
    return found | dict(recompute_method="block", recompute_num_layers=recompute.layers)


def vision_transformer_config(
    config: Qwen3VLConfig, layout: Layout, backend: Backend, recompute: Recompute
) -> TransformerConfig:
    """The vision tower's blocks; they live whole on the first pipeline stage."""
    vision = config.vision
    common = _common(layout, backend)
    common["tensor_model_parallel_size"] = layout.vision_tensor
    common["expert_model_parallel_size"] = common["expert_tensor_parallel_size"] = 1
    # images are shared out whole (image_shares.py)
    common["context_parallel_size"] = 1
    return TransformerConfig(
        num_layers=vision.depth,
        hidden_size=vision.hidden_size,
        num_attention_heads=vision.num_heads,
        ffn_hidden_size=vision.intermediate_size,
        normalization="LayerNorm",
        layernorm_epsilon=1e-6,
        activation_func=partial(F.gelu, approximate="tanh"),
        # megatron.core has fused kernels for the functions that it knows by name only
        bias_activation_fusion=False,
        add_bias_linear=True,
        # images are short and their number per micro-batch varies: if tensor ranks split the tower,
        # then by heads and features only
        sequence_parallel=False,
        **_recompute(Recompute("full" if recompute.vision else "none")),
        **common,
    )


def _pipeline(layout: Layout) -> dict[str, Any]:
    return dict(
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=(
            layout.virtual_pipeline if layout.virtual_pipeline > 1 else None
        ),
        # without it one call exchanges the shapes of both directions, and of two stages, which are
        # each other's next and previous one, each would take a shape for the other direction's
        overlap_p2p_comm=layout.virtual_pipeline > 1,
        num_layers_in_first_pipeline_stage=layout.first_stage_layers,
        num_layers_in_last_pipeline_stage=layout.last_stage_layers,
        account_for_embedding_in_pipeline_split=layout.embedding_as_layer,
        account_for_loss_in_pipeline_split=layout.loss_as_layer,
    )


def _common(layout: Layout, backend: Backend) -> dict[str, Any]:
    return dict(
        tensor_model_parallel_size=layout.tensor,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.expert_tensor,
        params_dtype=backend.dtype,
        pipeline_dtype=backend.dtype,
        bf16=backend.dtype is torch.bfloat16,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        # losses arrive already divided by global counts, so gradients are summed, never averaged
        calculate_per_token_loss=True,
        # weights always come from a checkpoint, and coverage is checked
        perform_initialization=False,
        use_cpu_initialization=backend.device.type == "cpu",
        gradient_accumulation_fusion=backend.fused_kernels,
        # without dropout two additions are left, which the host queues sooner than it calls what
        # torch.compile makes of them
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        batch_p2p_comm=False,
    )
