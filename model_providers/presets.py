"""The released Qwen3-VL architectures by name, and their Hugging Face config.json.

Sizes are those of the releases' config.json files; the tests compare parameter counts with
transformers' own model.
"""

from __future__ import annotations

from typing import Any, Literal

from model_providers.architecture import Qwen3VLConfig, VisionConfig

Dialect = Literal["4.57", "5"]
"""How transformers writes the file: 4.57 has rope_theta beside rope_scaling and num_experts, 5.x
has rope_parameters and num_local_experts."""

MAX_POSITIONS = 262144
VISION_START, VISION_END = 151652, 151653


def _preset(
    hidden_size: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    intermediate_size: int,
    *,
    moe_intermediate_size: int = 0,
    tied: bool = False,
    small_tower: bool = False,
) -> Qwen3VLConfig:
    return Qwen3VLConfig(
        vocab_size=151936,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=128,
        intermediate_size=intermediate_size,
        num_experts=128 if moe_intermediate_size else 0,
        top_k=8 if moe_intermediate_size else 0,
        moe_intermediate_size=moe_intermediate_size,
        rms_norm_eps=1e-6,
        rope_theta=5e6,
        mrope_section=(24, 20, 20),
        tie_word_embeddings=tied,
        image_token_id=151655,
        video_token_id=151656,
        dedicated=False,
        vision=VisionConfig(
            depth=24 if small_tower else 27,
            hidden_size=1024 if small_tower else 1152,
            intermediate_size=4096 if small_tower else 4304,
            num_heads=16,
            out_hidden_size=hidden_size,
            in_channels=3,
            patch_size=16,
            temporal_patch_size=2,
            spatial_merge_size=2,
            num_position_embeddings=2304,
            deepstack_visual_indexes=(5, 11, 17) if small_tower else (8, 16, 24),
        ),
    )


PRESETS: dict[str, Qwen3VLConfig] = {
    "qwen3-vl-2b": _preset(2048, 28, 16, 8, 6144, tied=True, small_tower=True),
    "qwen3-vl-4b": _preset(2560, 36, 32, 8, 9728, tied=True, small_tower=True),
    "qwen3-vl-8b": _preset(4096, 36, 32, 8, 12288),
    "qwen3-vl-32b": _preset(5120, 64, 64, 8, 25600),
    "qwen3-vl-30b-a3b": _preset(2048, 48, 32, 4, 6144, moe_intermediate_size=768),
    "qwen3-vl-235b-a22b": _preset(4096, 94, 64, 4, 12288, moe_intermediate_size=1536),
}


def hf_config(name: str, dialect: Dialect = "5") -> dict[str, Any]:
    """config.json of a preset as transformers writes it.

    Raises:
        ValueError: there is no preset of that name.
    """
    if name not in PRESETS:
        raise ValueError(f"{name!r} is no preset; there are {', '.join(PRESETS)}")
    config = PRESETS[name]
    kind = "qwen3_vl_moe" if config.num_experts else "qwen3_vl"
    rope = dict(rope_type="default", mrope_section=[*config.mrope_section], mrope_interleaved=True)
    text = dict(
        model_type=f"{kind}_text",
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        hidden_act="silu",
        rms_norm_eps=config.rms_norm_eps,
        max_position_embeddings=MAX_POSITIONS,
        attention_bias=False,
        # in 5.x a missing key here means True, whatever the top level says
        tie_word_embeddings=config.tie_word_embeddings,
    )
    if dialect == "5":
        text["rope_parameters"] = dict(rope_theta=config.rope_theta, **rope)
    else:
        text |= dict(rope_theta=config.rope_theta, rope_scaling=rope)
    if config.num_experts:
        text |= {
            "num_local_experts" if dialect == "5" else "num_experts": config.num_experts,
            "num_experts_per_tok": config.top_k,
            "moe_intermediate_size": config.moe_intermediate_size,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    vision = vars(config.vision) | dict(model_type=kind, hidden_act="gelu_pytorch_tanh")
    vision["deepstack_visual_indexes"] = [*config.vision.deepstack_visual_indexes]
    if dialect == "5":
        vision["model_type"] = f"{kind}_vision"
    architecture = "Qwen3VLMoe" if config.num_experts else "Qwen3VL"
    return dict(
        architectures=[f"{architecture}ForConditionalGeneration"],
        model_type=kind,
        transformers_version="5.6.0" if dialect == "5" else "4.57.0",
        text_config=text,
        vision_config=vision,
        image_token_id=config.image_token_id,
        video_token_id=config.video_token_id,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=config.tie_word_embeddings,
    )
