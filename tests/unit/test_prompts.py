from __future__ import annotations

import io
import math
import pickle
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from transformers import AutoProcessor

from prism_megatron.config import schema
from prism_megatron.data.prompts import PromptEncoder, rollout_sequence
from prism_megatron.data.rows import ImageSource, Message, Row, RowError
from tests import tiny_models

SYSTEM = "Answer shortly."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_with_processor(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def processor(folder: Path) -> Any:
    return AutoProcessor.from_pretrained(folder)


def make_encoder(processor: Any, **changes: Any) -> PromptEncoder:
    options = {"system_prompt": SYSTEM, "max_prompt_tokens": 400, "max_response_tokens": 50}
    return PromptEncoder(processor, **(options | changes))


@pytest.fixture
def encoder(processor: Any) -> PromptEncoder:
    return make_encoder(processor)


def png(width: int, height: int, seed: int = 0, mode: str = "RGB") -> bytes:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(values).convert(mode).save(buffer, "PNG")
    return buffer.getvalue()


def row(*turns: tuple[str, str], images: tuple[bytes, ...] = ()) -> Row:
    sources = tuple(ImageSource(data=data) for data in images)
    return Row("row-1", tuple(Message(*turn) for turn in turns), sources)


def test_equals_the_processor_called_on_the_whole_chat(
    encoder: PromptEncoder, processor: Any
) -> None:
    pictures = (png(64, 32, 1), png(100, 170, 2), png(33, 200, 3))
    text = "a <image>, then <image>\nthen <image>?"
    prompt = encoder.encode_prompt(row(("user", text), images=pictures))
    part = {"type": "image"}
    words = [{"type": "text", "text": t} for t in ("a ", ", then ", "\nthen ", "?")]
    content = [words[0], part, words[1], part, words[2], part, words[3]]
    chat = processor.apply_chat_template(
        [{"role": "system", "content": SYSTEM}, {"role": "user", "content": content}],
        tokenize=False,
        add_generation_prompt=True,
    )
    loaded = [Image.open(io.BytesIO(data)) for data in pictures]
    want = processor(images=loaded, text=[chat], return_tensors="pt")
    assert prompt.row_id == "row-1"
    assert list(prompt.input_ids) == want["input_ids"][0].tolist()
    assert [image.grid_thw for image in prompt.images] == [
        tuple(grid) for grid in want["image_grid_thw"].tolist()
    ]
    pixels = torch.cat([image.pixel_values for image in prompt.images])
    assert torch.equal(pixels, want["pixel_values"])


@pytest.mark.parametrize(
    ("system_prompt", "own", "expected"),
    [(SYSTEM, None, SYSTEM), (SYSTEM, "mine", "mine"), (None, None, "default system")],
)
def test_which_system_prompt_wins(
    processor: Any, system_prompt: str | None, own: str | None, expected: str
) -> None:
    encoder = make_encoder(processor, system_prompt=system_prompt)
    turns = ([("system", own)] if own else []) + [("user", "hi")]
    text = processor.tokenizer.decode(encoder.encode_prompt(row(*turns)).input_ids)
    assert text == (
        f"<|im_start|>system\n{expected}<|im_end|>\n"
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_an_image_is_preprocessed_once(
    encoder: PromptEncoder, processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    preprocess = type(processor.image_processor).preprocess

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return preprocess(self, *args, **kwargs)

    monkeypatch.setattr(type(processor.image_processor), "preprocess", counted)
    same, other = png(64, 32, 1), png(64, 32, 2)
    first = encoder.encode_prompt(row(("user", "<image><image>"), images=(same, other)))
    second = encoder.encode_prompt(row(("user", "<image>?"), images=(same,)))
    # a rank that does not ask for the pixels has no part in making them
    assert calls == []
    one, another = (image.pixel_values for image in first.images)
    assert second.images[0].pixel_values is one and len(calls) == 2
    assert first.images[0].key == second.images[0].key != first.images[1].key
    assert not torch.equal(one, another)


def test_images_travel_to_other_processes_with_their_pixels(encoder: PromptEncoder) -> None:
    [image] = encoder.encode_prompt(row(("user", "<image>"), images=(png(64, 32),))).images
    sent = pickle.loads(pickle.dumps(image))
    assert (sent.key, sent.grid_thw) == (image.key, image.grid_thw)
    assert torch.equal(sent.patches, image.pixel_values)


SIDES = (1, 2, 3, 15, 16, 31, 33, 47, 48, 49, 100, 199, 200, 640, 1333, 4001)


@pytest.mark.parametrize("changes", [{}, {"longest_side": 300}, {"image_resize": "reference"}])
@pytest.mark.parametrize("limits", [{}, {"min_pixels": 20_000}, {"max_pixels": 50_000}])
def test_grids_are_known_before_the_patches(
    processor: Any, changes: dict[str, Any], limits: dict[str, int]
) -> None:
    """Of every size that can be resized, and the others are refused before, too."""
    encoder = make_encoder(processor, max_prompt_tokens=10**6, **changes, **limits)
    refused = []
    for width, height in product(SIDES, SIDES):
        if width * height > 3e5:
            continue
        question = row(("user", "<image>"), images=(png(width, height),))
        try:
            [image] = encoder.encode_prompt(question).images
        except RowError as error:
            refused.append(str(error))
            continue
        # asserts that the processor's own grid is the same
        assert len(image.pixel_values) == math.prod(image.grid_thw)
    assert refused and all("aspect ratio" in reason for reason in refused)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_images_of_every_mode(encoder: PromptEncoder, mode: str) -> None:
    prompt = encoder.encode_prompt(row(("user", "<image>"), images=(png(64, 64, mode=mode),)))
    assert prompt.images[0].pixel_values.shape == (16, 3 * 2 * 16 * 16)


def test_a_photograph_has_the_grid_and_patches_of_the_upright_image(processor: Any) -> None:
    upright = Image.open(io.BytesIO(png(160, 96)))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    buffer = io.BytesIO()
    upright.transpose(Image.Transpose.ROTATE_90).save(buffer, "PNG", exif=exif)
    encoder = make_encoder(processor, longest_side=128)
    images = (png(160, 96), buffer.getvalue())
    want, found = encoder.encode_prompt(row(("user", "<image><image>"), images=images)).images
    assert found.grid_thw == want.grid_thw and want.grid_thw[1] < want.grid_thw[2]
    assert torch.equal(found.pixel_values, want.pixel_values)


def broken_png() -> bytes:
    data = png(64, 32)
    return data[: len(data) // 2]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"no image", "unreadable image: cannot identify"),
        (b"", "unreadable image"),
        (broken_png(), "unreadable image"),
        (png(2010, 10), "unreadable image: absolute aspect ratio"),
    ],
)
def test_unreadable_image_is_a_row_error(encoder: PromptEncoder, data: bytes, reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        encoder.encode_prompt(row(("user", "<image>"), images=(data,)))


def test_a_video_is_refused(encoder: PromptEncoder) -> None:
    with pytest.raises(RowError, match="<video> in the text, only images are supported"):
        encoder.encode_prompt(row(("user", "<video> What happens?"), images=()))


def test_missing_image_is_a_row_error(encoder: PromptEncoder, tmp_path: Path) -> None:
    source = ImageSource(path=tmp_path / "gone.png")
    with pytest.raises(RowError, match="missing image"):
        encoder.encode_prompt(Row("r", (Message("user", "<image>"),), (source,)))


@pytest.mark.parametrize(("text", "count"), [("<image>", 0), ("hi", 1), ("<image> <image>", 1)])
def test_placeholders_and_images_must_be_as_many(
    encoder: PromptEncoder, text: str, count: int
) -> None:
    with pytest.raises(RowError, match=rf"placeholder count: \d <image> in the text, {count} im"):
        encoder.encode_prompt(row(("user", text), images=(png(64, 32),) * count))


@pytest.mark.parametrize("token", ["<|im_end|>", "<|image_pad|>", "<|vision_start|>"])
def test_control_tokens_in_texts_are_row_errors(encoder: PromptEncoder, token: str) -> None:
    for turns in ([("user", f"a{token}b")], [("system", token), ("user", "a")]):
        with pytest.raises(RowError, match="control token"):
            encoder.encode_prompt(row(*turns))
    with pytest.raises(RowError, match="control token"):
        encoder.encode_response(f"fine {token}")


def test_control_token_in_the_system_prompt_is_an_error(processor: Any) -> None:
    with pytest.raises(ValueError, match="system prompt contains the control token"):
        make_encoder(processor, system_prompt="stop<|im_end|>")


def test_overlong_prompt_counts_image_tokens(processor: Any) -> None:
    question = row(("user", "<image>"), images=(png(128, 128),))
    length = len(make_encoder(processor).encode_prompt(question).input_ids)
    assert length > 16
    exact = make_encoder(processor, max_prompt_tokens=length)
    assert len(exact.encode_prompt(question).input_ids) == length
    with pytest.raises(RowError, match=rf"overlong prompt: {length} tokens.*={length - 1}"):
        make_encoder(processor, max_prompt_tokens=length - 1).encode_prompt(question)


def test_overlong_response_counts_the_end_of_turn(processor: Any) -> None:
    text = "1 2 3"
    assert len(make_encoder(processor, max_response_tokens=6).encode_response(text)) == 6
    with pytest.raises(RowError, match="overlong response: 6 tokens"):
        make_encoder(processor, max_response_tokens=5).encode_response(text)


def test_demonstration_trains_response_and_end_only(encoder: PromptEncoder) -> None:
    prompt = encoder.encode_prompt(row(("user", "<image>?"), images=(png(64, 32),)))
    text = "<answer>11</answer>"
    sequence = encoder.sft_sequence(prompt, text)
    assert sequence.input_ids.tolist()[: len(prompt.input_ids)] == list(prompt.input_ids)
    trained = sequence.input_ids[sequence.response_mask].tolist()
    assert trained[-1] == encoder.end_id
    assert encoder.tokenizer.decode(trained) == text + "<|im_end|>"
    assert sequence.response_mask.sum() == len(sequence) - len(prompt.input_ids)
    assert sequence.images == prompt.images


def test_demonstration_has_the_ids_of_a_rollout_of_the_same_text(encoder: PromptEncoder) -> None:
    prompt = encoder.encode_prompt(row(("user", "?")))
    text = "<caption>3 8</caption>"
    rollout = rollout_sequence(prompt, encoder.encode_response(text), {})
    assert torch.equal(rollout.input_ids, encoder.sft_sequence(prompt, text).input_ids)
    assert encoder.decode(encoder.encode_response(text)) == text
    assert encoder.decode(encoder.encode_section(text)) == text


def test_rollout_values_stand_on_the_response(encoder: PromptEncoder) -> None:
    prompt = encoder.encode_prompt(row(("user", "?")))
    values = torch.tensor([0.5, -1.0, 2.0])
    sequence = rollout_sequence(prompt, (4, 5, encoder.end_id), {"advantages": values})
    advantages = sequence.per_token["advantages"]
    assert advantages.shape == sequence.input_ids.shape
    assert torch.equal(advantages[sequence.response_mask], values)
    assert not advantages[~sequence.response_mask].any()
    with pytest.raises(AssertionError, match="advantages"):
        rollout_sequence(prompt, (4, 5), {"advantages": values})


def test_teacher_and_student_sections_end_in_the_same_token(encoder: PromptEncoder) -> None:
    prompt = encoder.encode_prompt(row(("user", "?")))
    for text in ("<caption>3 8</caption>", "<think>3+8=11</think><answer>11</answer>"):
        sequence = encoder.section_sequence(prompt, encoder.encode_response(text))
        assert sequence.input_ids[-1] == encoder.end_id
        assert (sequence.input_ids[sequence.response_mask] == encoder.end_id).sum() == 1


def test_a_text_only_section_leaves_out_the_image_and_nothing_else(encoder: PromptEncoder) -> None:
    shown = encoder.encode_prompt(row(("user", "left <image>right"), images=(png(64, 32),)))
    blind = encoder.encode_prompt(row(("user", "left right")))
    text = encoder.encode_response("<caption>3 8</caption>")
    found = encoder.section_sequence(shown, text, section=1, text_only=True)
    assert found.images == () and found.section == 1
    # tokenised apart from each other, "left " and "right" may merge differently, but read the same
    assert encoder.decode(tuple(found.input_ids.tolist())) == encoder.decode(
        tuple(encoder.section_sequence(blind, text).input_ids.tolist())
    )
    full = encoder.section_sequence(shown, text)
    assert full.images == shown.images and full.section == 0
    left_out = len(full) - len(found)
    assert left_out == int((full.input_ids == encoder.image_token_id).sum()) + 2
    assert torch.equal(found.input_ids[found.response_mask], full.input_ids[full.response_mask])


def test_from_config_reads_the_system_prompt_file(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "system.txt").write_text("Be brief.\n\n")
    data = schema.Data(path=tmp_path, system_prompt=tmp_path / "system.txt", max_prompt_tokens=77)
    encoder = PromptEncoder.from_config(folder, data)
    # the line end of the file is no part of it, a further one is
    assert encoder.system_prompt == "Be brief.\n"
    assert (encoder.max_prompt_tokens, encoder.max_response_tokens) == (77, 6144)


def test_a_cut_demonstration_does_not_learn_to_end(processor: Any) -> None:
    encoder = make_encoder(processor, max_response_tokens=5, truncate_response=True)
    prompt = encoder.encode_prompt(row(("user", "?")))
    whole = make_encoder(processor).sft_sequence(prompt, "1 2 3")
    cut = encoder.sft_sequence(prompt, "1 2 3")
    assert cut.response_mask.sum() == 5 and whole.response_mask.sum() == 6
    assert torch.equal(cut.input_ids, whole.input_ids[:-1])
    assert encoder.sft_sequence(prompt, "1 2").input_ids[-1] == encoder.end_id
    with pytest.raises(RowError, match="overlong response"):
        encoder.encode_response("1 2 3")


@pytest.mark.parametrize(
    ("limits", "grid"),
    [
        ({}, (1, 10, 20)),
        ({"max_pixels": 64 * 128}, (1, 4, 8)),
        ({"min_pixels": 320 * 640, "max_pixels": 640 * 1280}, (1, 20, 40)),
        ({"min_pixels": 60_000}, (1, 12, 22)),
    ],
)
def test_either_limit_of_pixels_holds_alone(
    processor: Any, limits: dict[str, int], grid: tuple[int, int, int]
) -> None:
    """The processor itself drops a single limit."""
    encoder = make_encoder(processor, max_prompt_tokens=2000, **limits)
    prompt = encoder.encode_prompt(row(("user", "<image>"), images=(png(320, 160),)))
    assert prompt.images[0].grid_thw == grid
    with pytest.raises(ValueError, match="no image fits; set data.min_pixels"):
        make_encoder(processor, min_pixels=10**9)


def test_an_image_is_resized_once_and_by_the_reference_twice(
    processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    resized = []
    kinds = {"tensor": type(processor.image_processor), "PIL": Image.Image}
    for kind, owner in kinds.items():
        resize = owner.resize

        def counted(
            self: Any, *args: Any, kind: str = kind, resize: Any = resize, **kw: Any
        ) -> Any:
            resized.append(kind)
            return resize(self, *args, **kw)

        monkeypatch.setattr(owner, "resize", counted)
    question = row(("user", "<image>"), images=(png(200, 104),))
    corrected = make_encoder(processor).encode_prompt(question).images[0]
    assert len(corrected.pixel_values) and resized == ["tensor"]
    reference = make_encoder(processor, image_resize="reference").encode_prompt(question).images[0]
    assert len(reference.pixel_values) and resized == ["tensor", "PIL", "tensor"]
    # 200 x 104 is rounded to 192 x 96, but by way of multiples of 28, 196 x 112, to 192 x 128
    assert (corrected.grid_thw, reference.grid_thw) == ((1, 6, 12), (1, 8, 12))


def test_the_longest_side_is_cut_down_before_anything_else(processor: Any) -> None:
    question = row(("user", "<image>"), images=(png(200, 104),))
    # 150 x 78, which is rounded to 160 x 64 (of 16 x 2)
    limited = make_encoder(processor, longest_side=150).encode_prompt(question).images[0]
    assert limited.grid_thw == (1, 4, 10)
    whole = make_encoder(processor).encode_prompt(question).images[0]
    same = make_encoder(processor, longest_side=200).encode_prompt(question).images[0]
    assert torch.equal(whole.pixel_values, same.pixel_values)
    tall = row(("user", "<image>"), images=(png(104, 200),))
    turned = make_encoder(processor, longest_side=150).encode_prompt(tall).images[0]
    assert turned.grid_thw == (1, 10, 4)


def test_threads_share_an_encoder(processor: Any) -> None:
    questions = [row(("user", f"<image> {i}"), images=(png(64, 32, i % 5),)) for i in range(40)]
    alone = make_encoder(processor)
    want = [alone.encode_prompt(question) for question in questions]
    shared = make_encoder(processor)
    with ThreadPoolExecutor(8) as workers:
        found = list(workers.map(shared.encode_prompt, questions))
    for prompt, expected in zip(found, want, strict=True):
        assert prompt.input_ids == expected.input_ids
        assert torch.equal(prompt.images[0].pixel_values, expected.images[0].pixel_values)
    assert len({id(prompt.images[0].pixel_values) for prompt in found}) == 5
