"""Splitting a response into sections, in text and in tokens of a real byte-level BPE."""

from __future__ import annotations

import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from prism_megatron.objectives.sections import (
    STREAMS,
    Sections,
    caption_tokens,
    reference_sections,
    response_text,
    split_sections,
    token_bytes,
)

VALID = "<caption> 3 8 </caption><think> 3 + 8 = 11 </think><answer> 11 </answer>"
BODIES = ["7", " 3 8 ", "π ≈ 3.14, 数学 🙂", "a > b\n- c < d", "</ caption>", "> <", "🙂🙂\n"]
SEPARATORS = ["", "\n", " \n\t", "\r\n\r\n"]


def compose(caption: str, think: str, answer: str, space: str) -> str:
    return (
        f"{space}<caption>{caption}</caption>{space}<think>{think}</think>{space}"
        f"<answer>{answer}</answer>{space}"
    )


TEXTS = [
    compose(caption, think, answer, space)
    for caption, think, answer in zip(BODIES, BODIES[2:] + BODIES[:2], BODIES[::-1], strict=True)
    for space in SEPARATORS
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Merges cross tags and line breaks ("></think>\\n"), as large vocabularies' do."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_end|>", "<|image_pad|>"],
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS[:20], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    fast.add_tokens(["</think>"])  # not special, as in Qwen3's vocabulary
    return fast


@pytest.fixture(scope="module")
def table(tokenizer: PreTrainedTokenizerFast) -> tuple[bytes, ...]:
    return token_bytes(tokenizer)


@pytest.fixture(scope="module")
def end(tokenizer: PreTrainedTokenizerFast) -> int:
    return tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_bodies_are_kept_as_written() -> None:
    sections = split_sections("\n" + VALID.replace("><", ">\n \n<") + "\n")
    assert sections is not None
    assert (sections.caption, sections.think, sections.answer) == (
        " 3 8 ",
        " 3 + 8 = 11 ",
        " 11 ",
    )


def test_stream_texts_do_not_tell_how_sections_were_separated() -> None:
    joined, spread = split_sections(VALID), split_sections(VALID.replace("><", "> \n\n <"))
    assert joined is not None and spread is not None
    assert joined.caption_text == spread.caption_text == "<caption> 3 8 </caption>"
    assert joined.reasoning_text == spread.reasoning_text
    assert joined.reasoning_text == "<think> 3 + 8 = 11 </think>\n<answer> 11 </answer>"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "11",
        VALID[:-1],
        "Sure! " + VALID,
        VALID + " done",
        VALID + VALID,
        VALID.replace("<caption>", "<caption>x</caption><caption>"),
        VALID.replace("3 + 8", "<answer>12</answer>"),
        VALID.replace("3 + 8", "<answer>"),
        VALID.replace("</think>", "</think></think>"),
        VALID.replace(" 3 8 ", ""),
        VALID.replace(" 3 + 8 = 11 ", " \n "),
        VALID.replace(" 11 </answer>", "</answer>"),
        VALID.replace("</caption><think>", "</caption>so<think>"),
        VALID.replace("think>", "thought>"),
        VALID.replace("<answer>", "<Answer>"),
        "<think>a</think><caption>b</caption><answer>c</answer>",
        VALID.replace("3 8", "3 <|image_pad|> 8"),
        VALID.replace("</caption>", "</caption><|im_end|>"),
    ],
)
def test_invalid_responses(text: str) -> None:
    assert split_sections(text) is None


def test_table_holds_the_bytes_of_every_token(
    tokenizer: PreTrainedTokenizerFast, table: tuple[bytes, ...]
) -> None:
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert b"".join(table[index] for index in ids) == text.encode()
    assert table[tokenizer.convert_tokens_to_ids("</think>")] == b"</think>"
    assert len(table) == len(tokenizer)


def test_every_stream_reads_its_part_in_uniform_white_space() -> None:
    sections = split_sections(VALID.replace("><", ">\r\n\n<"))
    assert sections is not None
    read = {stream: sections.read_by(stream) for kind in STREAMS.values() for stream in kind}
    assert read == {
        "caption": "<caption> 3 8 </caption>",
        "reasoning": "<think> 3 + 8 = 11 </think>\n<answer> 11 </answer>",
        "response": VALID.replace("><", ">\n<"),
    }


def test_no_byte_level_bpe_is_an_error() -> None:
    words = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    with pytest.raises(ValueError, match="byte-level BPE"):
        token_bytes(PreTrainedTokenizerFast(tokenizer_object=words))


def random_segmentation(text: str, table: tuple[bytes, ...], rng: random.Random) -> list[int]:
    """Any ids whose bytes are the text's, such as sampling may give and encoding would not."""
    rest, ids = text.encode(), []
    candidates = [(index, piece) for index, piece in enumerate(table) if piece]
    while rest:
        index, piece = rng.choice([pair for pair in candidates if rest.startswith(pair[1])])
        ids.append(index)
        rest = rest[len(piece) :]
    return ids


@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back_from_any_segmentation(
    text: str, table: tuple[bytes, ...], tokenizer: PreTrainedTokenizerFast, end: int
) -> None:
    for ids in (tokenizer.encode(text), random_segmentation(text, table, random.Random(text))):
        assert response_text(ids, table, {end}) == text
        assert response_text([*ids, end], table, {end}) == text


def test_control_tokens_in_a_response_make_it_invalid(
    tokenizer: PreTrainedTokenizerFast, table: tuple[bytes, ...], end: int
) -> None:
    ids = tokenizer.encode(VALID)
    image = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    for broken in ([*ids, image], [*ids[:2], image, *ids[2:]], [*ids, end, end], [image, *ids]):
        assert split_sections(response_text(broken, table, {end})) is None


def test_ids_without_text_are_not_white_space(
    tokenizer: PreTrainedTokenizerFast, table: tuple[bytes, ...], end: int
) -> None:
    ids = tokenizer.encode(VALID)
    beyond = len(table) + 3
    assert response_text([*ids, beyond], table, {end}) == VALID + "\ufffd"
    assert response_text([], table, {end}) == ""


def test_the_reference_takes_what_its_lazy_pattern_takes() -> None:
    nested = (
        "<caption>a</caption> <caption>b</caption>\n<think></think><answer>1</answer> 2</answer>\n"
    )
    found = reference_sections(nested)
    assert found == Sections("a</caption> <caption>b", "", "1</answer> 2")
    assert split_sections(nested) is None
    assert reference_sections(VALID) == split_sections(VALID)
    for text in (VALID + " done", VALID.replace("</caption><", "</caption>so<"), "no tags"):
        assert reference_sections(text) is None


@pytest.mark.parametrize("text", TEXTS)
def test_a_caption_ends_with_the_first_token_that_completes_it(
    text: str, table: tuple[bytes, ...], tokenizer: PreTrainedTokenizerFast, end: int
) -> None:
    sections = reference_sections(text)
    assert sections is not None
    lengths = set()
    for seed in range(4):
        ids = [*random_segmentation(text, table, random.Random(seed)), end]
        count = caption_tokens(ids, table, sections.caption)
        lengths.add(count)
        decoded = [
            b"".join(table[i] for i in ids[:n]).decode(errors="replace") for n in (count - 1, count)
        ]
        assert [sections.caption_text in part for part in decoded] == [False, True]
    assert len(lengths) > 1


def test_a_caption_may_hold_its_closing_tag_and_hidden_tokens(
    tokenizer: PreTrainedTokenizerFast, table: tuple[bytes, ...], end: int
) -> None:
    """Tokens a byte each: 25 of the caption, its inner closing tag included, in which one is
    hidden."""
    text = "<caption>a</caption>b</caption><think>c</think><answer>d</answer>"
    ids = [tokenizer.get_vocab()[character] for character in text]
    hidden = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    ids.insert(15, hidden)
    assert response_text([*ids, end], table, {end}, {hidden}) == text
    assert caption_tokens(ids, table, "a</caption>b", {hidden}) == 31 + 1
    assert caption_tokens(ids, table, "a", {hidden}) == 20 + 1
