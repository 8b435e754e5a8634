"""Qwen3-VL architectures: read from a Hugging Face config.json, turned into megatron.core configs.

Both dialects are read: transformers 4.57 (rope_theta and rope_scaling) and 5.x (rope_parameters).
What the file does not say is an error, since class defaults differ between transformers versions.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core.transformer.moe.fused_a2a import HAVE_DEEP_EP, HAVE_HYBRIDEP
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from model_providers.backend import Backend
from model_providers.parallel import Layout

Dispatcher = Literal["alltoall", "deepep", "hybridep"]
"""How tokens get to experts on other ranks: NCCL's all-to-all, or kernels of their own."""

SECTIONS = ("perception", "reasoning")
"""What a discriminator judges: captions; thinking and answers."""


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


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower (transformers Qwen3VLVisionConfig)."""

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    out_hidden_size: int
    in_channels: int
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int
    num_position_embeddings: int
    deepstack_visual_indexes: tuple[int, ...]

    @property
    def patch_dim(self) -> int:
        """Values of one flattened patch."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    def work(self, frames: int, height: int, width: int) -> float:
        """What the blocks compute for an image of so many patches, beside another's: linear layers,
        and attention within each frame (multiply-adds, divided by 2 * hidden * depth)."""
        linear = 2 * self.hidden_size + self.intermediate_size
        return frames * height * width * (linear + height * width)


@dataclass(frozen=True)
class Qwen3VLConfig:
    """One Qwen3-VL, dense (num_experts=0) or Mixture-of-Experts, with or without a value head."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    num_experts: int
    top_k: int
    moe_intermediate_size: int
    dedicated: bool
    """Experts and value heads are divided between SECTIONS; otherwise one head judges both."""
    rms_norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, int, int]
    tie_word_embeddings: bool
    image_token_id: int
    video_token_id: int
    vision: VisionConfig

    @classmethod
    def from_hf(cls, path: Path | str) -> Qwen3VLConfig:
        """Read `path`/config.json; ValueError names what is missing or not supported."""
        file = Path(path) / "config.json"
        if not file.exists():
            raise FileNotFoundError(f"{file} not found; give a Hugging Face Qwen3-VL directory")
        try:
            raw = json.loads(file.read_text())
        except ValueError as error:
            raise ValueError(f"{file} is truncated or no JSON: {error}") from error
        return cls.from_dict(raw, str(file))

    @classmethod
    def from_dict(cls, raw: dict[str, Any], source: str) -> Qwen3VLConfig:
        """The same from the parsed file; `source` names it in errors."""
        kind = raw.get("model_type")
        if kind not in ("qwen3_vl", "qwen3_vl_moe"):
            raise ValueError(f"{source}: model_type is {kind!r}, wanted qwen3_vl or qwen3_vl_moe")
        text, vision = _Fields(raw, "text_config", source), _Fields(raw, "vision_config", source)
        text.expect("hidden_act", "silu")
        vision.expect("hidden_act", "gelu_pytorch_tanh")
        rope = text.values.get("rope_parameters") or text.values.get("rope_scaling") or {}
        theta = rope.get("rope_theta", text.values.get("rope_theta"))
        if theta is None or "mrope_section" not in rope:
            raise ValueError(
                f"{source}: text_config has no rope_theta or no mrope_section; defaults differ "
                "tenfold between transformers versions, so write both into rope_parameters"
            )
        if rope.get("rope_type", "default") != "default":
            raise ValueError(f"{source}: rope_type {rope['rope_type']!r} is not supported")
        moe = kind == "qwen3_vl_moe"
        if moe and (
            text.values.get("mlp_only_layers") or text.values.get("decoder_sparse_step", 1) != 1
        ):
            raise ValueError(f"{source}: mixed dense and expert layers are not supported")
        experts = text.values.get("num_experts", text.values.get("num_local_experts"))
        if moe and experts is None:
            raise ValueError(f"{source}: text_config lacks num_experts")
        return cls(
            vocab_size=text["vocab_size"],
            hidden_size=text["hidden_size"],
            num_layers=text["num_hidden_layers"],
            num_heads=text["num_attention_heads"],
            num_kv_heads=text["num_key_value_heads"],
            head_dim=text["head_dim"],
            intermediate_size=text["intermediate_size"],
            num_experts=experts if moe else 0,
            top_k=text["num_experts_per_tok"] if moe else 0,
            moe_intermediate_size=text["moe_intermediate_size"] if moe else 0,
            dedicated=_is_dedicated(raw, text, experts if moe else 0, source),
            rms_norm_eps=text["rms_norm_eps"],
            rope_theta=float(theta),
            mrope_section=tuple(rope["mrope_section"]),
            # the top level decides: text_config's default is True even where the model unties
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            image_token_id=raw["image_token_id"],
            video_token_id=raw["video_token_id"],
            vision=VisionConfig(
                depth=vision["depth"],
                hidden_size=vision["hidden_size"],
                intermediate_size=vision["intermediate_size"],
                num_heads=vision["num_heads"],
                out_hidden_size=vision["out_hidden_size"],
                in_channels=vision["in_channels"],
                patch_size=vision["patch_size"],
                temporal_patch_size=vision["temporal_patch_size"],
                spatial_merge_size=vision["spatial_merge_size"],
                num_position_embeddings=vision["num_position_embeddings"],
                deepstack_visual_indexes=tuple(vision["deepstack_visual_indexes"]),
            ),
        )

    @property
    def token_weights(self) -> int:
        """Weights of a decoder layer's linear layers that a token passes."""
        heads, kv_heads = self.num_heads, self.num_kv_heads
        weights = self.hidden_size * self.head_dim * (2 * heads + 2 * kv_heads)
        if self.num_experts:
            weights += self.hidden_size * self.num_experts
            return weights + 3 * self.top_k * self.hidden_size * self.moe_intermediate_size
        return weights + 3 * self.hidden_size * self.intermediate_size

    def work(self, tokens: int) -> float:
        """What the decoder computes for a sequence, beside another's: linear layers, and causal
        attention (multiply-adds a layer)."""
        return tokens * (self.token_weights + self.num_heads * self.head_dim * tokens)

    @property
    def num_deepstack(self) -> int:
        """Decoder layers that get a deepstack feature added after them."""
        return len(self.vision.deepstack_visual_indexes)

    def deepstack_left(self, layers: int) -> int:
        """Deepstack features that are still to be added after the first `layers` decoder layers;
        they travel with the hidden states."""
        return max(0, self.num_deepstack - layers)

    @property
    def value_heads(self) -> tuple[str, ...]:
        """Hugging Face names of a discriminator's heads, each [1, hidden_size]."""
        # "1" is the place of the linear layer in the reference's Sequential(Dropout, Linear)
        return tuple(f"v_head.{name}.weight" for name in (SECTIONS if self.dedicated else ("1",)))

    def check_layout(self, layout: Layout) -> None:
        """ValueError if this model can't be split as `layout` says, before any collective."""
        divisible = {
            "attention heads": (self.num_heads, layout.tensor),
            "key-value heads": (self.num_kv_heads, layout.tensor),
            "vision heads": (self.vision.num_heads, layout.tensor),
            "vision feed-forward size": (self.vision.intermediate_size, layout.tensor),
        }
        if self.num_experts:
            divisible["experts"] = (self.num_experts, layout.expert)
            divisible["expert feed-forward size"] = (
                self.moe_intermediate_size,
                layout.expert_tensor,
            )
        else:
            divisible["feed-forward size"] = (self.intermediate_size, layout.tensor)
            if layout.expert > 1:
                raise ValueError(
                    f"expert parallel size {layout.expert}, but the model is dense; set it to 1"
                )
        for what, (number, parts) in divisible.items():
            if number % parts:
                raise ValueError(
                    f"{number} {what} can't be split in {parts}; choose sizes that divide {number}"
                )
        if self.num_experts and layout.tensor > 1 and not layout.sequence_parallel:
            raise ValueError(
                "experts with tensor parallelism need sequence parallelism; set sequence=true"
            )
        self._check_stages(layout)

    def check_recompute(self, recompute: Recompute, backend: Backend) -> None:
        """ValueError if the backend or this model has no such module to compute again."""
        asked = set(recompute.modules)
        if missing := asked - backend.recompute_modules:
            raise ValueError(
                f"backend {backend.name!r} can't recompute {', '.join(sorted(missing))}; choose "
                f"from {', '.join(sorted(backend.recompute_modules))}"
            )
        foreign = asked & ({"mlp"} if self.num_experts else {"moe", "moe_act"})
        if foreign:
            kind = "Mixture-of-Experts" if self.num_experts else "dense"
            raise ValueError(
                f"recompute.modules has {', '.join(sorted(foreign))}, which a {kind} model does "
                "not have; remove it"
            )

    def check_offload(
        self, layers: int, layout: Layout, recompute: Recompute, backend: Backend
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
        if layers >= self.num_layers:
            raise ValueError(
                f"offload_layers={layers}, but the last of {self.num_layers} decoder layers is "
                f"needed again at once; set it to {self.num_layers - 1} or less"
            )

    def check_dispatcher(self, dispatcher: Dispatcher, layout: Layout, backend: Backend) -> None:
        """ValueError if tokens can't be sent to this model's experts so."""
        if dispatcher == "alltoall":
            return
        if backend.moe_dispatcher != "alltoall":
            raise ValueError(
                f"dispatcher={dispatcher!r} needs GPUs; backend {backend.name!r} gathers all "
                "tokens on every rank, so leave it out or choose backend=cuda"
            )
        if layout.expert * layout.expert_tensor == 1 or not self.num_experts:
            raise ValueError(
                f"dispatcher={dispatcher!r} sends tokens to experts on other ranks, but there are "
                f"{self.num_experts} experts at expert={layout.expert}, expert_tensor="
                f"{layout.expert_tensor}; leave it out or spread experts over ranks"
            )
        if not {"deepep": HAVE_DEEP_EP, "hybridep": HAVE_HYBRIDEP}[dispatcher]:
            raise ValueError(
                f"dispatcher={dispatcher!r} needs DeepEP with its kernels for it, which can't be "
                "imported; install it from github.com/deepseek-ai/DeepEP (branch hybrid-ep for "
                "hybridep) or leave dispatcher out"
            )

    def _check_stages(self, layout: Layout) -> None:
        """megatron.core's rules for spreading layers over stages, before it meets them itself."""
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
        layers = self.num_layers - sum(ends.values()) + len(extra)
        stages = layout.pipeline - len(ends)
        parts = stages * chunks
        counted = f"{self.num_layers} decoder layers"
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


def _is_dedicated(raw: dict[str, Any], text: _Fields, num_experts: int, source: str) -> bool:
    """What upcycling wrote down of the discriminator (checkpoint_tools.upcycle); the reference's
    checkpoints say nothing and are `shared`."""
    possible = ("shared", "dedicated") if num_experts else ("dense",)
    architecture = raw.get("prism_discriminator", {}).get("architecture", possible[0])
    if architecture not in possible:
        raise ValueError(
            f"{source}: prism_discriminator.architecture is {architecture!r}, but a model with "
            f"{num_experts} experts is {' or '.join(possible)}"
        )
    if architecture == "dedicated":
        check_dedicated(num_experts, text["num_experts_per_tok"], source)
    return bool(architecture == "dedicated")


def check_dedicated(num_experts: int, top_k: int, source: str) -> None:
    """ValueError if the experts can't be divided evenly between the sections."""
    each, rest = divmod(num_experts, len(SECTIONS))
    if rest or top_k > each:
        raise ValueError(
            f"{source}: a dedicated discriminator divides num_experts={num_experts} between "
            f"{' and '.join(SECTIONS)}, and a token takes top_k={top_k} of its section's; give an "
            "even number of experts, at least twice top_k"
        )


class _Fields:
    """A sub-dictionary whose missing keys are errors that name the file."""

    def __init__(self, raw: dict[str, Any], key: str, source: str) -> None:
        if key not in raw:
            raise ValueError(f"{source}: no {key}")
        self.values: dict[str, Any] = raw[key]
        self.where = f"{source}: {key}"

    def __getitem__(self, key: str) -> Any:
        if self.values.get(key) is None:
            raise ValueError(f"{self.where} lacks {key}, and its default is not safe to assume")
        return self.values[key]

    def expect(self, key: str, value: object) -> None:
        if self.values.get(key) != value:
            raise ValueError(f"{self.where}.{key} is {self.values.get(key)!r}, wanted {value!r}")


FP8Recipe = Literal["delayed", "tensorwise", "blockwise"]
"""Transformer Engine's scaling: by a history of maxima, by the tensor's own maximum, or by the
maxima of 1 x 128 (activations) and 128 x 128 (weights) blocks."""


@dataclass(frozen=True)
class Precision:
    """What the decoder's matrix products compute in; vision tower, router and heads stay in the
    backend's dtype."""

    fp8: FP8Recipe | None = None
    """E4M3 forward, E5M2 gradients; None computes in the backend's dtype."""
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
        self, backend: Backend, config: Qwen3VLConfig, layout: Layout, recompute: Recompute
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

    def transformer_fields(self, num_experts: int) -> dict[str, Any]:
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
            # an expert's tokens are as many as come; they are filled up to what FP8 needs
            moe_router_padding_for_quantization=bool(num_experts),
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
    Qwen3VLConfig.check_layout says the same in our words.
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
            moe_grouped_gemm=backend.grouped_gemm,
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
        **options.precision.transformer_fields(config.num_experts),
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
        # images are short and their number per micro-batch varies: the tower is split over tensor
        # ranks by heads and features only
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
