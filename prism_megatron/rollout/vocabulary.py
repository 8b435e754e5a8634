"""What a response may hold, of every engine alike."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig


@dataclass(frozen=True)
class Vocabulary:
    """Which ids of a model a response may hold.

    stop: ids that end it; image: the placeholder of an image's features; forbidden: placeholders
    and marks of images and videos, which are never sampled; size: ids from here on belong to no
    token.
    """

    stop: tuple[int, ...]
    image: int
    forbidden: tuple[int, ...]
    size: int

    @classmethod
    def of(cls, hf_dir: Path) -> Vocabulary:
        """Of a Hugging Face directory; ValueError if no id ends a response."""
        stop = GenerationConfig.from_pretrained(hf_dir).eos_token_id
        if stop is None:
            raise ValueError(
                f"{hf_dir}/generation_config.json has no eos_token_id, so no response would end; "
                "set it to the id of <|im_end|>"
            )
        config = AutoConfig.from_pretrained(hf_dir)
        forbidden = (
            config.image_token_id,
            config.video_token_id,
            config.vision_start_token_id,
            config.vision_end_token_id,
        )
        tokenizer = AutoTokenizer.from_pretrained(hf_dir)
        ends = tuple(torch.tensor(stop).reshape(-1).tolist())
        return cls(ends, config.image_token_id, forbidden, len(tokenizer))

    def finish_reason(self, ids: tuple[int, ...], told: str, longest: int) -> str:
        """What the server told, or "invalid" if an id belongs to no token.

        longest: how many ids were asked for. SGLang looks for a cut before it looks at its last
        token, so what is cut off may have ended with that (schedule_batch.py, check_finished).
        """
        if any(token >= self.size for token in ids):
            return "invalid"
        if told == "abort" and ids and ids[-1] in self.stop:
            return "stop"
        return "length" if told == "abort" and len(ids) >= longest else told
