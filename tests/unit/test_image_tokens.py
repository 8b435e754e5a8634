"""The ids that a trainer trains on are the ones that engines see, over thousands of prompts."""

from __future__ import annotations

import base64
import io
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from prism_megatron.config.schema import Sampling
from prism_megatron.data.prompts import PromptEncoder
from prism_megatron.data.rows import ImageSource, Message, Row
from prism_megatron.rollout import pixels, sglang, vllm
from prism_megatron.rollout.vocabulary import Vocabulary
from prism_megatron.types import Prompt, VisualInputs
from tests import tiny_models
from tests.mock_sglang import prompt_of
from tests.mock_vllm import vllm_prompt_of

PROMPTS = 2000
WORDS = ("3+8=", "sum", "\n", " \t", "<caption>", "</image>", "image >", "<", "é", "数", "🙂", "  ")
# any width and height: neither multiples of a patch nor of what is merged
SIZES = [(8, 8), (31, 33), (64, 32), (57, 130), (200, 21), (90, 90)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_with_processor(tmp_path_factory.mktemp("tiny"))


def pictures() -> list[bytes]:
    found = []
    for number, (width, height) in enumerate(SIZES):
        values = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(values).save(buffer, "PNG")
        found.append(buffer.getvalue())
    return found


def rows(count: int) -> list[tuple[Row, list[dict[str, Any]]]]:
    """Random rows, and the same as a chat of transformers: no image to three, anywhere in the text,
    with pieces of text that resemble placeholders."""
    draw, stored, found = random.Random(5), pictures(), []
    for number in range(count):
        images, parts, text = [], [], ""
        for _ in range(draw.randrange(1, 7)):
            if len(images) < 3 and draw.random() < 0.3:
                images.append(draw.randrange(len(stored)))
                parts.append({"type": "image"})
                text += "<image>"
            else:
                word = draw.choice(WORDS)
                parts.append({"type": "text", "text": word})
                text += word
        sources = tuple(ImageSource(data=stored[i]) for i in images)
        chat = [{"role": "user", "content": parts, "pictures": [stored[i] for i in images]}]
        found.append((Row(str(number), (Message("user", text),), sources), chat))
    return found


def by_transformers(processor: Any, chat: list[dict[str, Any]]) -> list[int]:
    text = processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    images = [Image.open(io.BytesIO(data)) for data in chat[0]["pictures"]]
    return list(processor(images=images or None, text=[text])["input_ids"][0])


def test_ids_are_those_of_transformers_and_of_the_engines(folder: Path) -> None:
    processor, vocabulary = AutoProcessor.from_pretrained(folder), Vocabulary.of(folder)
    encoder = PromptEncoder(
        processor, system_prompt=None, max_prompt_tokens=4000, max_response_tokens=50
    )
    shown = 0
    for number, (row, chat) in enumerate(rows(PROMPTS)):
        prompt = encoder.encode_prompt(row)
        assert list(prompt.input_ids) == by_transformers(processor, chat), row
        sampling = Sampling(n=1 + number % 3, max_new_tokens=8)
        for_sglang = json.loads(json.dumps(sglang.request(prompt, sampling, vocabulary)))
        seen = prompt_of(for_sglang)
        assert seen.input_ids == prompt.input_ids
        assert_same_images(prompt, [(i.grid_thw, i.pixel_values) for i in seen.images])
        for_vllm = json.loads(json.dumps(vllm.request(prompt, sampling, vocabulary)))
        seen = vllm_prompt_of(for_vllm)
        assert seen.input_ids == prompt.input_ids
        assert_same_images(prompt, [(i.grid_thw, i.pixel_values) for i in seen.images])
        assert_images_have_their_places(for_vllm.get("features"), prompt, processor)
        shown += len(prompt.images)
    assert shown > PROMPTS / 2


@pytest.mark.parametrize("levels", (2, 256, 257, 5000))
@pytest.mark.parametrize("still", (True, False))
def test_every_value_arrives_and_a_still_image_of_8_bits_is_small(levels: int, still: bool) -> None:
    generator = torch.Generator().manual_seed(levels)
    # 257 values and more that BF16 tells apart, of either sign
    values = torch.linspace(-5, 5, levels)
    patches, patch = 24, 3 * 2 * 16 * 16
    frame = torch.randint(levels, (patches, 3, 1, 256), generator=generator)
    other = frame if still else frame.flip(0)
    shown = values[torch.cat([frame, other], dim=2)].reshape(patches, patch)
    encoded = json.loads(json.dumps(pixels.encode(VisualInputs("a", shown, (1, 4, 6)))))
    assert torch.equal(pixels.decode(encoded, patches), shown.to(torch.bfloat16))
    few = len(shown.to(torch.bfloat16).unique()) <= 256
    assert few == (levels <= 256)
    size = len(base64.b64decode(encoded["values"]))
    assert size == patches * patch * (1 if few else 2) // (2 if still else 1)


def assert_same_images(
    prompt: Prompt, seen: list[tuple[tuple[int, int, int], torch.Tensor]]
) -> None:
    assert len(seen) == len(prompt.images)
    for image, (grid, patches) in zip(prompt.images, seen, strict=True):
        assert grid == image.grid_thw
        assert torch.equal(patches, image.pixel_values.to(torch.bfloat16).float())


def assert_images_have_their_places(features: Any, prompt: Prompt, processor: Any) -> None:
    """All runs of image tokens, each as long as its image."""
    places = features["mm_placeholders"]["image"] if features else []
    merged = processor.image_processor.merge_size**2
    lengths = [len(image.pixel_values) // merged for image in prompt.images]
    assert [place["length"] for place in places] == lengths
    shown = [i for place in places for i in range(place["offset"], sum(place.values()))]
    tokens = enumerate(prompt.input_ids)
    assert shown == [i for i, token in tokens if token == processor.image_token_id]
