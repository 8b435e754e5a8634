"""A random-initialised tiny Qwen3-VL with a real processor, in Hugging Face format.

The architecture is the released one (vision tower with deepstack mergers, interleaved MRoPE,
grouped-query attention with q/k norms); only the sizes are small. Every size differs from every
other, so that a swapped dimension fails instead of passing by luck, and all of them split at
tensor parallel size 2.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import AddedToken
from transformers import (
    GenerationConfig,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

END_OF_TEXT = "<|endoftext|>"
END_OF_TURN = "<|im_end|>"
SPECIAL_TOKENS = (
    END_OF_TEXT,
    "<|im_start|>",
    END_OF_TURN,
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
ROLES = ("system", "user", "assistant")
MAX_POSITIONS = 2048
MIN_PIXELS = 32 * 32
MAX_PIXELS = 64 * 32 * 32

CHAT_TEMPLATE = """\
{%- if messages[0].role != 'system' and SYSTEM_PROMPT -%}
<|im_start|>system
{{ SYSTEM_PROMPT }}<|im_end|>
{% endif -%}
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.content is string -%}
{{ message.content }}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}
<|vision_start|><|image_pad|><|vision_end|>
{%- elif part.type == 'video' -%}
<|vision_start|><|video_pad|><|vision_end|>
{%- else -%}
{{ part.text }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""


def create(out: Path, texts: Iterable[str], system_prompt: str, vocab_size: int, seed: int) -> None:
    """Write model, processor and generation config to `out`.

    texts: what the byte-level BPE learns its merges from, the system prompt is added to them.
    system_prompt: the system turn that the chat template writes when a conversation brings none.
    vocab_size: embedding rows. The BPE may end with fewer tokens when the texts run out of pairs;
    the last rows are then never used, as in the released models.
    """
    tokenizer = _train_tokenizer([*texts, system_prompt, *ROLES], vocab_size)
    torch.manual_seed(seed)
    model = Qwen3VLForConditionalGeneration(_config(tokenizer, vocab_size))
    end_ids = tokenizer.convert_tokens_to_ids([END_OF_TURN, END_OF_TEXT])
    model.generation_config = GenerationConfig(eos_token_id=end_ids, pad_token_id=end_ids[1])
    model.save_pretrained(out)
    _processor(tokenizer, system_prompt).save_pretrained(out)


def _train_tokenizer(texts: list[str], vocab_size: int) -> Qwen2Tokenizer:
    """A byte-level BPE with Qwen's pre-tokenisation, which keeps every digit a token of its own."""
    trained = Qwen2Tokenizer().train_new_from_iterator(
        texts, vocab_size, new_special_tokens=list(SPECIAL_TOKENS), show_progress=False
    )
    # Only what the constructor is given is saved with a tokenizer, so it is built once more.
    model = json.loads(trained.backend_tokenizer.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=[tuple(pair) for pair in model["merges"]],
        eos_token=END_OF_TURN,
        padding_side="left",
        model_max_length=MAX_POSITIONS,
    )
    # Not the constructor's extra_special_tokens: transformers 4 can't read them as a list.
    tokenizer.add_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    return tokenizer


def _config(tokenizer: Qwen2Tokenizer, vocab_size: int) -> Qwen3VLConfig:
    token_id = tokenizer.convert_tokens_to_ids
    return Qwen3VLConfig(
        text_config={
            "vocab_size": vocab_size,
            "hidden_size": 128,
            "intermediate_size": 336,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 40,
            "max_position_embeddings": MAX_POSITIONS,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [8, 6, 6],
                "mrope_interleaved": True,
            },
            "bos_token_id": token_id(END_OF_TEXT),
            "eos_token_id": token_id(END_OF_TURN),
            "pad_token_id": token_id(END_OF_TEXT),
            "dtype": "float32",
        },
        vision_config={
            "depth": 2,
            "hidden_size": 96,
            "intermediate_size": 208,
            "num_heads": 6,
            "out_hidden_size": 128,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
        },
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
        tie_word_embeddings=False,
    )


def _processor(tokenizer: Qwen2Tokenizer, system_prompt: str) -> Qwen3VLProcessor:
    size = {"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS}
    half = [0.5, 0.5, 0.5]
    image_processor = Qwen2VLImageProcessor(
        patch_size=16,
        temporal_patch_size=2,
        merge_size=2,
        size=size,
        image_mean=half,
        image_std=half,
    )
    video_processor = Qwen3VLVideoProcessor(size=size)
    literal = f"{{%- set SYSTEM_PROMPT = {json.dumps(system_prompt.strip())} -%}}\n"
    return Qwen3VLProcessor(
        image_processor, tokenizer, video_processor, chat_template=literal + CHAT_TEMPLATE
    )
