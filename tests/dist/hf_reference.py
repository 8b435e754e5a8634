"""The same sequences through transformers, one at a time: what packed rows must equal."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, PreTrainedModel

from prism_megatron.types import Sequence
from tests.tiny_models import IMAGE, VIDEO


def load(path: Path) -> PreTrainedModel:
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32)
    assert isinstance(model, PreTrainedModel)
    return model.eval()


def logits(model: PreTrainedModel, sequence: Sequence) -> Tensor:
    """Logits of one sequence alone, [L, vocab]."""
    found: Tensor = model(**_inputs(sequence)).logits
    return found[0]


def hidden(model: PreTrainedModel, sequence: Sequence) -> Tensor:
    """Last hidden states of one sequence alone, after the final norm, [L, h]."""
    found: Tensor = model.model(**_inputs(sequence)).last_hidden_state
    return found[0]


def _inputs(sequence: Sequence) -> dict[str, Tensor]:
    ids = sequence.input_ids[None]
    visuals: dict[str, Tensor] = {}
    if images := sequence.images:
        visuals["pixel_values"] = torch.cat([image.pixel_values for image in images])
        visuals["image_grid_thw"] = torch.tensor([image.grid_thw for image in images])
    if videos := sequence.videos:
        visuals["pixel_values_videos"] = torch.cat([video.pixel_values for video in videos])
        visuals["video_grid_thw"] = torch.tensor([video.grid_thw for video in videos])
    return dict(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        mm_token_type_ids=(ids == IMAGE).int() + 2 * (ids == VIDEO).int(),
        **visuals,
    )


def loss(logits: Tensor, sequence: Sequence, tokens: float) -> Tensor:
    """Weighted cross-entropy of the sequence's response tokens, divided by `tokens`."""
    own = logits[:-1].log_softmax(-1).gather(1, sequence.input_ids[1:, None]).squeeze(1)
    trained = sequence.response_mask[1:]
    return -(own * sequence.per_token["weight"][1:])[trained].sum() / tokens


def distance(found: Tensor, wanted: Tensor) -> float:
    """Largest absolute difference in units of the wanted tensor's largest value."""
    assert found.shape == wanted.shape, (found.shape, wanted.shape)
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30))
