from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import Qwen3VLConfig, Qwen3VLModel

from prism_megatron.data.mrope import mrope_positions

IMAGE, VIDEO, TEXT = 51, 52, 3
MERGE = 2
TOKENS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "merge_size": MERGE}


@pytest.fixture(scope="module")
def model() -> Qwen3VLModel:
    text = {
        "vocab_size": 60,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [2, 1, 1],
            "mrope_interleaved": True,
        },
    }
    vision = {
        "depth": 1,
        "hidden_size": 12,
        "num_heads": 2,
        "intermediate_size": 20,
        "out_hidden_size": 16,
        "deepstack_visual_indexes": [0],
    }
    config = Qwen3VLConfig(
        text_config=text, vision_config=vision, image_token_id=IMAGE, video_token_id=VIDEO
    )
    return Qwen3VLModel(config)


def ids(*parts: int | tuple[int, tuple[int, int, int]]) -> Tensor:
    """Numbers are runs of text, (token, grid) is an image or one video frame."""
    tokens: list[int] = []
    for part in parts:
        if isinstance(part, int):
            tokens += [TEXT] * part
        else:
            token, (t, h, w) = part
            tokens += [token] * (t * h * w // MERGE**2)
    return torch.tensor(tokens)


def reference(
    model: Qwen3VLModel, tokens: Tensor, images: list, videos: list | None = None
) -> Tensor:
    types = (tokens == IMAGE).int() + 2 * (tokens == VIDEO).int()
    positions, _ = model.get_rope_index(
        tokens[None],
        types[None],
        torch.tensor(images) if images else None,
        torch.tensor(videos) if videos else None,
    )
    return positions[:, 0]


WIDE, TALL, SQUARE = (1, 2, 10), (1, 14, 4), (1, 6, 6)


@pytest.mark.parametrize(
    ("parts", "grids"),
    [
        ((9,), []),
        ((4, (IMAGE, WIDE), 5), [WIDE]),
        (((IMAGE, TALL), 2), [TALL]),
        ((3, (IMAGE, SQUARE)), [SQUARE]),
        ((3, (IMAGE, WIDE), 1, (IMAGE, TALL), 2, (IMAGE, SQUARE), 7), [WIDE, TALL, SQUARE]),
    ],
)
def test_equals_transformers_on_images(model: Qwen3VLModel, parts: tuple, grids: list) -> None:
    tokens = ids(*parts)
    positions = mrope_positions(tokens, grids, [], **TOKENS)
    assert torch.equal(positions, reference(model, tokens, grids))


def test_equals_transformers_on_videos_between_images(model: Qwen3VLModel) -> None:
    frame = (1, 4, 8)
    clip = (VIDEO, frame)
    tokens = ids(
        2, (IMAGE, WIDE), 3, clip, 2, clip, 2, clip, 1, (IMAGE, TALL), 1, (VIDEO, SQUARE), 4
    )
    videos = [(3, 4, 8), SQUARE]
    positions = mrope_positions(tokens, [WIDE, TALL], videos, **TOKENS)
    assert torch.equal(positions, reference(model, tokens, [WIDE, TALL], videos))


def test_adjacent_images_are_told_apart_by_their_grids() -> None:
    tokens = ids((IMAGE, (1, 2, 4)), (IMAGE, (1, 4, 2)), 1)
    positions = mrope_positions(tokens, [(1, 2, 4), (1, 4, 2)], [], **TOKENS)
    assert positions.tolist() == [[0, 0, 2, 2, 4], [0, 0, 2, 3, 4], [0, 1, 2, 2, 4]]


@pytest.mark.parametrize(
    ("tokens", "grids", "message"),
    [
        (ids(2, (IMAGE, SQUARE)), [], "all 0 grids are used up"),
        (ids(2, (IMAGE, SQUARE)), [SQUARE, WIDE], "1 of 2 grids have no placeholders"),
        (ids(2, (IMAGE, SQUARE), 4), [TALL], "needs 14 placeholders"),
        (ids(2, (IMAGE, SQUARE)), [TALL], "needs 14 placeholders"),
    ],
)
def test_placeholders_and_grids_must_match(tokens: Tensor, grids: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mrope_positions(tokens, grids, [], **TOKENS)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (ids(1, (VIDEO, (1, 2, 2)), 1), r"grid \(1, 4, 2\) needs 2 placeholders 52 at index 1"),
        (ids(1, (VIDEO, (1, 4, 2)), 3), "2 of 3 grids have no placeholders 52"),
        (ids(1, *[(VIDEO, (1, 4, 2)), 1] * 4), "at index 10: all 3 grids are used up"),
    ],
)
def test_a_video_has_a_span_for_each_frame(tokens: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mrope_positions(tokens, [], [(3, 4, 2)], **TOKENS)
