"""Tiny random Qwen3-VL models in Hugging Face format, with every size different from the others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    PreTrainedModel,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

from checkpoint_tools import hf_writer, tiny_qwen3vl

IMAGE, VIDEO, VISION_START, VISION_END, VOCAB = 200, 201, 198, 199, 203

TEXT = dict(
    vocab_size=VOCAB,
    hidden_size=56,
    intermediate_size=112,
    num_hidden_layers=4,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=16,
    rms_norm_eps=1e-6,
    hidden_act="silu",
    max_position_embeddings=512,
    rope_parameters=dict(
        rope_theta=5e6, rope_type="default", mrope_section=[4, 2, 2], mrope_interleaved=True
    ),
)
VISION = dict(
    depth=3,
    hidden_size=48,
    intermediate_size=72,
    num_heads=4,
    out_hidden_size=56,
    patch_size=8,
    temporal_patch_size=2,
    spatial_merge_size=2,
    num_position_embeddings=36,
    # three features, so that at two decoder layers a stage one crosses to the next stage
    deepstack_visual_indexes=[0, 1, 2],
    in_channels=3,
    hidden_act="gelu_pytorch_tanh",
)
DEDICATED = dict(num_experts=8, num_experts_per_tok=3, moe_intermediate_size=64)
EXPERTS = dict(
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=40,
    decoder_sparse_step=1,
    mlp_only_layers=[],
    norm_topk_prob=True,
)


def build(kind: str, tied: bool = False, seed: int = 0, layers: int = 4) -> PreTrainedModel:
    """kind "dense", "moe" or "dedicated"; every weight random, norms around one, so that nothing
    cancels."""
    torch.manual_seed(seed)
    ids: dict[str, Any] = dict(
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=tied,
    )
    text = TEXT | {"num_hidden_layers": layers}
    if kind in ("moe", "dedicated"):
        experts = EXPERTS
        if kind == "dedicated":
            experts = EXPERTS | DEDICATED
            ids["prism_discriminator"] = {"architecture": "dedicated"}
        config = Qwen3VLMoeConfig(text_config=text | experts, vision_config=VISION, **ids)
        model: PreTrainedModel = Qwen3VLMoeForConditionalGeneration(config)
    else:
        config = Qwen3VLConfig(text_config=text, vision_config=VISION, **ids)
        model = Qwen3VLForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 1.0 if "mlp.gate.weight" in name else 0.2
            around = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(around + scale * torch.randn_like(parameter))
    return model.float().eval()


def save(directory: Path, kind: str, tied: bool = False, layers: int = 4) -> Path:
    """Write the model as a Hugging Face directory and return it."""
    build(kind, tied, layers=layers).save_pretrained(directory)
    return directory


# multiples of the blocks and heads that engines and their kernels take, all distinct
SERVED_TEXT = dict(
    hidden_size=256,
    intermediate_size=640,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=64,
    num_hidden_layers=2,
    rope_parameters=dict(
        rope_theta=5e6, rope_type="default", mrope_section=[16, 8, 8], mrope_interleaved=True
    ),
)
SERVED_VISION = dict(hidden_size=288, intermediate_size=608, out_hidden_size=256)
SERVED_EXPERTS = dict(num_experts=6, moe_intermediate_size=384)


def save_served(directory: Path, processor: Path, kind: str, tied: bool = False) -> Path:
    """A random BF16 model that an engine can serve and quantised formats fit, with the processor
    and the token ids of the Hugging Face directory `processor`.

    kind: "dense" or "moe".
    """
    torch.manual_seed(0)
    ours = json.loads((processor / "config.json").read_text())
    ids: dict[str, Any] = {k: value for k, value in ours.items() if k.endswith("_token_id")}
    ids["tie_word_embeddings"] = tied
    text = TEXT | SERVED_TEXT | {"vocab_size": ours["text_config"]["vocab_size"]}
    text["max_position_embeddings"] = ours["text_config"]["max_position_embeddings"]
    vision = VISION | SERVED_VISION
    for key in ("patch_size", "temporal_patch_size", "spatial_merge_size"):
        vision[key] = ours["vision_config"][key]
    model: PreTrainedModel
    if kind == "moe":
        experts = EXPERTS | SERVED_EXPERTS
        config = Qwen3VLMoeConfig(text_config=text | experts, vision_config=vision, **ids)
        model = Qwen3VLMoeForConditionalGeneration(config)
    else:
        model = Qwen3VLForConditionalGeneration(
            Qwen3VLConfig(text_config=text, vision_config=vision, **ids)
        )
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.05)
    hf_writer.copy_config(processor, directory)
    model.bfloat16().save_pretrained(directory)
    return directory


def save_with_processor(out: Path) -> Path:
    """A model as the quickstart's, with tokenizer, chat template and image processor."""
    texts = ["<caption>3 8</caption><think>3+8=11</think><answer>11</answer>"] * 9
    tiny_qwen3vl.create(out, texts, "default system", 340, seed=1)
    return out
