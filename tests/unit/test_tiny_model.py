from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoProcessor, Qwen3VLForConditionalGeneration, Qwen3VLProcessor

from checkpoint_tools import tiny_qwen3vl

VOCAB = 350
SYSTEM = 'Say "yes" or\nno; nothing else.'
TEXTS = [
    "<caption>3 8</caption><think>3+8=11</think><answer>11</answer>",
    "Add the two digits.",
] * 9


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tiny")
    tiny_qwen3vl.create(out, TEXTS, SYSTEM, VOCAB, seed=3)
    return out


@pytest.fixture(scope="module")
def processor(folder: Path) -> Any:
    return AutoProcessor.from_pretrained(folder)


def test_loads_without_a_missing_or_unexpected_key(folder: Path) -> None:
    _, info = Qwen3VLForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]


def test_sizes_are_distinct_and_split_at_two_ranks(folder: Path) -> None:
    config = Qwen3VLForConditionalGeneration.from_pretrained(folder).config
    text, vision = config.text_config, config.vision_config
    sizes = [
        text.hidden_size,
        text.intermediate_size,
        text.num_attention_heads * text.head_dim,
        text.num_key_value_heads * text.head_dim,
        text.head_dim,
        vision.hidden_size,
        vision.intermediate_size,
        vision.hidden_size // vision.num_heads,
        vision.hidden_size * config.vision_config.spatial_merge_size**2,
        text.vocab_size,
    ]
    assert len(set(sizes)) == len(sizes)
    splits = [text.num_attention_heads, text.num_key_value_heads, text.intermediate_size]
    splits += [vision.num_heads, vision.intermediate_size, text.vocab_size]
    assert all(size % 2 == 0 for size in splits)
    assert vision.hidden_size % vision.num_heads == 0
    assert sum(text.rope_parameters["mrope_section"]) == text.head_dim // 2
    assert text.rope_parameters["mrope_interleaved"] and text.rope_parameters["rope_theta"]
    assert len(vision.deepstack_visual_indexes) == 2 <= text.num_hidden_layers
    assert not config.tie_word_embeddings


def test_weights_follow_the_seed(folder: Path, tmp_path: Path) -> None:
    def weights(path: Path) -> torch.Tensor:
        model = Qwen3VLForConditionalGeneration.from_pretrained(path)
        return torch.cat([parameter.flatten() for parameter in model.parameters()])

    for seed, same in ((3, True), (4, False)):
        tiny_qwen3vl.create(tmp_path / str(seed), TEXTS, SYSTEM, VOCAB, seed=seed)
        assert torch.equal(weights(tmp_path / str(seed)), weights(folder)) == same


def test_processor_is_complete(processor: Any) -> None:
    assert isinstance(processor, Qwen3VLProcessor)
    assert processor.image_processor.merge_size == processor.video_processor.merge_size == 2
    assert processor.image_processor.patch_size == processor.video_processor.patch_size == 16
    assert processor.tokenizer.padding_side == "left"
    assert len(processor.tokenizer) <= VOCAB


def test_token_ids_of_model_generation_and_processor_agree(folder: Path, processor: Any) -> None:
    model = Qwen3VLForConditionalGeneration.from_pretrained(folder)
    token_id = processor.tokenizer.convert_tokens_to_ids
    assert model.config.image_token_id == processor.image_token_id == token_id("<|image_pad|>")
    assert model.config.video_token_id == processor.video_token_id == token_id("<|video_pad|>")
    assert model.config.vision_start_token_id == token_id("<|vision_start|>")
    ends = [token_id("<|im_end|>"), token_id("<|endoftext|>")]
    assert model.generation_config.eos_token_id == ends
    assert processor.tokenizer.eos_token_id == ends[0]
    assert model.generation_config.pad_token_id == processor.tokenizer.pad_token_id == ends[1]
    assert len({*ends, processor.image_token_id, processor.video_token_id}) == 4


@pytest.mark.parametrize("text", ["0123456789", "3+8=11", "é 漢字 \u2028\n\tend", TEXTS[0]])
def test_byte_level_bpe_gives_every_text_back(processor: Any, text: str) -> None:
    ids = processor.tokenizer(text).input_ids
    assert processor.tokenizer.decode(ids) == text
    assert max(ids) < VOCAB


def test_every_digit_is_a_token(processor: Any) -> None:
    tokens = processor.tokenizer.tokenize("11 <answer>11</answer>3+8=11")
    assert sorted(t for t in tokens if any(c.isdigit() for c in t)) == ["1"] * 6 + ["3", "8"]


def test_special_tokens_are_one_token_each(processor: Any) -> None:
    for token in tiny_qwen3vl.SPECIAL_TOKENS:
        assert len(processor.tokenizer(token).input_ids) == 1


def test_chat_template(processor: Any) -> None:
    content = [{"type": "image"}, {"type": "text", "text": "\nWhat?"}]
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "8"}]
    user = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>\nWhat?<|im_end|>\n"
    system = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n"
    render = processor.apply_chat_template
    assert render(turns, tokenize=False) == f"{system}{user}<|im_start|>assistant\n8<|im_end|>\n"
    prompt = f"{system}{user}<|im_start|>assistant\n"
    assert render(turns[:1], tokenize=False, add_generation_prompt=True) == prompt
    own = [{"role": "system", "content": "mine"}, turns[0]]
    assert render(own, tokenize=False) == f"<|im_start|>system\nmine<|im_end|>\n{user}"
