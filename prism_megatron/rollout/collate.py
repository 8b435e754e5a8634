"""A batch of prompts in the form that Hugging Face's Qwen3-VL takes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from prism_megatron.types import Prompt


def collate_prompts(
    prompts: Sequence[Prompt],
    *,
    pad_id: int,
    image_token_id: int,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """Left-pad prompts to one length and lay their images end to end.

    Returns input_ids, attention_mask and mm_token_type_ids (1 on image tokens), each [B, L] int64,
    and, if there is any image, pixel_values [P, D] and image_grid_thw [N, 3]. Left padding puts
    every prompt's last token in the last column, where the first response token is predicted.
    """
    length = max(len(prompt.input_ids) for prompt in prompts)
    input_ids = torch.full((len(prompts), length), pad_id)
    attention_mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        start = length - len(prompt.input_ids)
        input_ids[row, start:] = torch.tensor(prompt.input_ids)
        attention_mask[row, start:] = 1
    batch = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "mm_token_type_ids": (input_ids == image_token_id).long() * attention_mask,
    }
    images = [image for prompt in prompts for image in prompt.images]
    if images:
        batch["pixel_values"] = torch.cat([image.pixel_values for image in images])
        batch["image_grid_thw"] = torch.tensor([image.grid_thw for image in images])
    return {name: tensor.to(device) for name, tensor in batch.items()}
