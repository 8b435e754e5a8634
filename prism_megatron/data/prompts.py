"""Rows into token ids and preprocessed images, with the model's own processor.

    row -> chat template -> ids, one placeholder an image -> placeholders expanded -> Prompt
    Prompt + response ids -> Sequence

Prompt and response are tokenised apart, so a demonstration has the ids that a rollout of the same
text would have.
"""

from __future__ import annotations

import hashlib
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from threading import Lock
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from checkpoint_tools.images import decode_image
from prism_megatron.config import schema
from prism_megatron.data.rows import ImageSource, Message, Row, RowError, read_system_prompt
from prism_megatron.objectives.sections import response_text, token_bytes
from prism_megatron.types import Prompt, Sequence, VisualInputs

IMAGE_PLACEHOLDER = "<image>"
VIDEO_PLACEHOLDER = "<video>"
END_OF_TURN = "<|im_end|>"
VISION_BOUNDS = ("<|vision_start|>", "<|vision_end|>")
CACHED_PATCH_BYTES = 512 * 2**20

Size = tuple[int, int]
"""Width and height in pixels."""


class PromptEncoder:
    """Turns rows into prompts and texts into training sequences; several threads may use one.

    processor: a Qwen3VLProcessor. system_prompt: the system turn of rows that bring none; None
    leaves it to the chat template. Rows that can't be encoded raise RowError. For the others see
    schema.Data.
    """

    def __init__(
        self,
        processor: Any,
        *,
        system_prompt: str | None,
        max_prompt_tokens: int,
        max_response_tokens: int,
        truncate_response: bool = False,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        longest_side: int | None = None,
        image_resize: str = "corrected",
    ):
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.system_prompt = system_prompt
        self.max_prompt_tokens = max_prompt_tokens
        self.max_response_tokens = max_response_tokens
        self.truncate_response = truncate_response
        self.image_token_id: int = processor.image_token_id
        self.end_id: int = self.tokenizer.convert_tokens_to_ids(END_OF_TURN)
        self.pad_id: int = self.tokenizer.pad_token_id
        bounds = self.tokenizer.convert_tokens_to_ids(list(VISION_BOUNDS))
        self._vision_ids = {self.image_token_id, *bounds}
        self.merge_size: int = processor.image_processor.merge_size
        added = self.tokenizer.added_tokens_decoder
        self.control_ids = frozenset(index for index, token in added.items() if token.special)
        control = [added[index].content for index in sorted(self.control_ids)]
        self._control = re.compile("|".join(map(re.escape, control)))
        self._images = _Images(
            _Preprocessor(
                processor.image_processor, min_pixels, max_pixels, longest_side, image_resize
            )
        )
        if system_prompt is not None and (found := self._control.search(system_prompt)):
            raise ValueError(
                f"the system prompt contains the control token {found[0]!r}; remove it"
            )

    @classmethod
    def from_config(cls, model: Path, data: schema.Data) -> Self:
        """The encoder of a Hugging Face directory for one stage's data section."""
        return cls(
            AutoProcessor.from_pretrained(model),
            system_prompt=read_system_prompt(data.system_prompt),
            max_prompt_tokens=data.max_prompt_tokens,
            max_response_tokens=data.max_response_tokens,
            truncate_response=data.overlong == "truncate_response",
            min_pixels=data.min_pixels,
            max_pixels=data.max_pixels,
            longest_side=data.longest_side,
            image_resize=data.image_resize,
        )

    def encode_prompt(self, row: Row) -> Prompt:
        """The row's turns and the opening of the assistant's, images preprocessed."""
        if any(VIDEO_PLACEHOLDER in message.content for message in row.messages):
            raise RowError(f"video: {VIDEO_PLACEHOLDER} in the text, only images are supported")
        found = sum(message.content.count(IMAGE_PLACEHOLDER) for message in row.messages)
        if found != len(row.images):
            raise RowError(
                f"placeholder count: {found} {IMAGE_PLACEHOLDER} in the text, "
                f"{len(row.images)} images"
            )
        images = tuple(self._images.get(source) for source in row.images)
        ids = self._expand(self._render(row.messages), images)
        if len(ids) > self.max_prompt_tokens:
            raise RowError(
                f"overlong prompt: {len(ids)} tokens with its images, "
                f"data.max_prompt_tokens={self.max_prompt_tokens}"
            )
        return Prompt(row.row_id, tuple(ids), images)

    def encode_section(self, text: str, *, is_sampled: bool = False) -> tuple[int, ...]:
        """Ids of a response or a part of one, without the end of the turn; is_sampled: of any
        length, which is what sampling made it."""
        ids = self._text_ids(text)
        if not is_sampled and len(ids) + 1 > self.max_response_tokens:
            raise RowError(
                f"overlong response: {len(ids) + 1} tokens with the end of the turn, "
                f"data.max_response_tokens={self.max_response_tokens}"
            )
        return ids

    def encode_response(self, text: str) -> tuple[int, ...]:
        """Ids of a whole response as a model samples it: the end-of-turn token is the last."""
        return (*self.encode_section(text), self.end_id)

    def sft_sequence(self, prompt: Prompt, response_text: str) -> Sequence:
        """A demonstration: response and end of turn are trained, the prompt is not.

        One that is too long is a RowError, or cut off where the encoder truncates: it has no end
        of turn then, so that ending there is not learned.
        """
        if self.truncate_response:
            ids = (*self._text_ids(response_text), self.end_id)[: self.max_response_tokens]
        else:
            ids = self.encode_response(response_text)
        return rollout_sequence(prompt, ids, {})

    def section_sequence(
        self, prompt: Prompt, ids: tuple[int, ...], *, section: int = 0, text_only: bool = False
    ) -> Sequence:
        """What the discriminator scores: prompt, then the ids of a section, end included.

        section: which one it is, to a dedicated discriminator; text_only: without the prompt's
        images and their tokens.
        """
        if text_only:
            text = tuple(i for i in prompt.input_ids if i not in self._vision_ids)
            prompt = replace(prompt, input_ids=text, images=())
        return replace(rollout_sequence(prompt, ids, {}), section=section)

    def hidden_ids(self, way: schema.Defect) -> frozenset[int]:
        """Ids that are left out of a response's text. corrected: none, so that a control token
        makes it ill-formed; reference: all control tokens, which its tokenizer skips (verl's reward
        managers and dp_critic.py, skip_special_tokens)."""
        return self.control_ids if way == "reference" else frozenset()

    @cached_property
    def token_bytes(self) -> tuple[bytes, ...]:
        """See sections.token_bytes."""
        return token_bytes(self.tokenizer)

    def decode(self, ids: tuple[int, ...], way: schema.Defect = "corrected") -> str:
        """Text of response ids, without the end-of-turn token; way: see hidden_ids."""
        return response_text(ids, self.token_bytes, (self.end_id,), self.hidden_ids(way))

    def _text_ids(self, text: str) -> tuple[int, ...]:
        if found := self._control.search(text):
            raise RowError(f"control token in a text: {found[0]!r}")
        return tuple(self.tokenizer(text, add_special_tokens=False).input_ids)

    def _render(self, messages: tuple[Message, ...]) -> list[int]:
        """Ids of the chat with one placeholder token an image."""
        turns = [_typed(message) for message in messages]
        for message in messages:
            # A user's literal control token would end the turn or claim an image.
            if found := self._control.search(message.content):
                raise RowError(f"control token in a text: {found[0]!r}")
        if self.system_prompt is not None and messages[0].role != "system":
            turns.insert(0, _typed(Message("system", self.system_prompt)))
        text = self.processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        ids: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        return ids

    def _expand(self, ids: list[int], images: tuple[VisualInputs, ...]) -> list[int]:
        """Each image's placeholder repeated once a feature row."""
        counts = iter(images)
        expanded: list[int] = []
        for token in ids:
            if token == self.image_token_id:
                t, h, w = next(counts).grid_thw
                expanded += [token] * (t * h * w // self.merge_size**2)
            else:
                expanded.append(token)
        return expanded


def rollout_sequence(
    prompt: Prompt, response_ids: tuple[int, ...], per_token: Mapping[str, Tensor]
) -> Sequence:
    """Prompt and response as one training sequence of L tokens.

    per_token: values of the response tokens, each [len(response_ids)]; 0 on the prompt.
    """
    num_prompt, num_response = len(prompt.input_ids), len(response_ids)
    for name, value in per_token.items():
        assert value.shape == (num_response,), f"{name}: {value.shape}, {num_response} tokens"
    zeros = torch.zeros(num_prompt)
    return Sequence(
        input_ids=torch.tensor([*prompt.input_ids, *response_ids], dtype=torch.int64),
        images=prompt.images,
        response_mask=torch.arange(num_prompt + num_response) >= num_prompt,
        per_token={name: torch.cat([zeros, value]) for name, value in per_token.items()},
    )


def _typed(message: Message) -> dict[str, Any]:
    """A turn for the chat template: text parts, and an image part for each placeholder."""
    parts: list[dict[str, str]] = []
    for number, text in enumerate(message.content.split(IMAGE_PLACEHOLDER)):
        if number:
            parts.append({"type": "image"})
        if text:
            parts.append({"type": "text", "text": text})
    return {"role": message.role, "content": parts}


class _Images:
    """Images by the content of their files; the patches that were asked for last are kept."""

    def __init__(self, preprocessor: _Preprocessor):
        self._preprocessor = preprocessor
        self._patches: OrderedDict[str, Tensor] = OrderedDict()
        self._bytes = 0
        self._lock = Lock()

    def get(self, source: ImageSource) -> VisualInputs:
        """The image, its patches made when they are asked for; RowError if it can't be read,
        decoded or resized."""
        data = source.read()
        key = hashlib.sha256(data).hexdigest()
        grid = self._preprocessor.grid(data)
        return VisualInputs(key, partial(self._patches_of, key, data, grid), grid)

    def _patches_of(self, key: str, data: bytes, grid: tuple[int, int, int]) -> Tensor:
        with self._lock:
            if key in self._patches:
                self._patches.move_to_end(key)
                return self._patches[key]
        patches, found = self._preprocessor.patches(data)
        assert found == grid, f"the processor cuts an image into {found} patches, not {grid}"
        with self._lock:
            if key not in self._patches:
                self._add(key, patches)
            return self._patches[key]

    def _add(self, key: str, patches: Tensor) -> None:
        self._patches[key] = patches
        self._bytes += patches.nbytes
        while self._bytes > CACHED_PATCH_BYTES and len(self._patches) > 1:
            _, dropped = self._patches.popitem(last=False)
            self._bytes -= dropped.nbytes


class _Preprocessor:
    """Decodes images and cuts them into patches; the processor resizes them, once where neither
    longest_side nor the reference's resizing is asked for.

    Image processors take a limit only together with the other one, and drop a single one silently
    (the reference's warm-up lost its max_pixels so), so both are always given.
    """

    def __init__(
        self,
        image_processor: Any,
        min_pixels: int | None,
        max_pixels: int | None,
        longest_side: int | None,
        resize: str,
    ):
        size = image_processor.size
        self._processor = image_processor
        self._size = {
            "shortest_edge": min_pixels or size["shortest_edge"],
            "longest_edge": max_pixels or size["longest_edge"],
        }
        if self._size["shortest_edge"] > self._size["longest_edge"]:
            raise ValueError(
                f"images of {self._size['shortest_edge']} to {self._size['longest_edge']} pixels: "
                "no image fits; set data.min_pixels and data.max_pixels"
            )
        self._before: list[tuple[Callable[[Size], Size], Image.Resampling]] = []
        if longest_side is not None:
            self._before.append((partial(_within, longest_side), Image.Resampling.LANCZOS))
        if resize == "reference":
            self._before.append((_size_in_the_reference, Image.Resampling.BICUBIC))

    def grid(self, data: bytes) -> tuple[int, int, int]:
        """(t, h, w) of an encoded image; RowError if the bytes are no image that can be resized.

        The image is decoded, since only that shows that it is whole. Its patches would take some
        times longer, and many times the bytes, on every rank.
        """
        try:
            size = decode_image(data).size
            for resized, _ in self._before:
                size = resized(size)
            patch = self._processor.patch_size
            height, width = smart_resize(
                size[1],
                size[0],
                factor=patch * self._processor.merge_size,
                min_pixels=self._size["shortest_edge"],
                max_pixels=self._size["longest_edge"],
            )
        except ValueError as error:
            raise RowError(f"unreadable image: {error}") from error
        return 1, height // patch, width // patch

    def patches(self, data: bytes) -> tuple[Tensor, tuple[int, int, int]]:
        """pixel_values [P, D] of an image whose `grid` was found, and that grid."""
        image = decode_image(data)
        for resized, resampling in self._before:
            image = image.resize(resized(image.size), resampling)
        inputs = self._processor(images=[image], size=self._size, return_tensors="pt")
        t, h, w = inputs["image_grid_thw"][0].tolist()
        return inputs["pixel_values"], (t, h, w)


def _within(longest_side: int, size: Size) -> Size:
    """load_image of the reference's train_moe_vl_warmup_fast.py; sides are rounded down."""
    if max(size) <= longest_side:
        return size
    scale = longest_side / max(size)
    return max(1, int(size[0] * scale)), max(1, int(size[1] * scale))


def _size_in_the_reference(size: Size) -> Size:
    """qwen_vl_utils.fetch_image with its default patch size of 14 (verl vision_utils.py), which the
    reference runs before Qwen3-VL's own processor and its patches of 16."""
    factor = 14 * 2
    height, width = smart_resize(
        size[1],
        size[0],
        factor=factor,
        min_pixels=4 * factor**2,
        max_pixels=16384 * factor**2,
    )
    return width, height
