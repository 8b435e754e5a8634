"""The sections of a response: caption, think, answer.

    ids --token_bytes--> bytes --> text --split_sections--> Sections --> two discriminator inputs

Teacher and student go through one path. Their text is split by `split_sections` and the
discriminator reads `Sections.caption_text` and `Sections.reasoning_text`, tokenised anew for both
sides. Sampled ids are not fed to it: a policy samples merges that the tokenizer itself never
writes, and the teacher, known as text alone, never shows them, so the ids would give the class
away. The white space between sections is made uniform for the same reason.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

from tokenizers import decoders

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TAGS = ("<caption>", "</caption>", "<think>", "</think>", "<answer>", "</answer>")
_LAYOUT = re.compile(
    r"\s*<caption>(.*)</caption>\s*<think>(.*)</think>\s*<answer>(.*)</answer>\s*",
    re.DOTALL | re.ASCII,
)
STREAMS = {"sections": ("caption", "reasoning"), "response": ("response",)}
"""What the discriminator is shown of an answer, by name: its sections one by one (PRISM), or the
whole of it at once (GAD)."""
_CAPTION_TO_THINK = re.compile(r"</caption>\s*<think>")
_THINK_TO_ANSWER = re.compile(r"</think>\s*<answer>")
CONTROL_TOKEN = re.compile(r"<\|\w+\|>")
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}".encode()


@dataclass(frozen=True)
class Sections:
    """The bodies of a valid response, as written, without their tags."""

    caption: str
    think: str
    answer: str

    @property
    def caption_text(self) -> str:
        """What the perception stream reads."""
        return f"<caption>{self.caption}</caption>"

    @property
    def reasoning_text(self) -> str:
        """What the reasoning stream reads: thinking and answer, without the caption."""
        return f"<think>{self.think}</think>\n<answer>{self.answer}</answer>"

    def read_by(self, stream: str) -> str:
        """What that stream of the discriminator reads; see STREAMS."""
        caption, reasoning = self.caption_text, self.reasoning_text
        whole = f"{caption}\n{reasoning}"
        return {"caption": caption, "reasoning": reasoning, "response": whole}[stream]


def split_sections(text: str) -> Sections | None:
    """The sections of a response, or None if it is not valid.

    Valid is: exactly one caption, think and answer section in this order, none of them blank,
    nothing but white space around them, no chat control token (`<|...|>`) anywhere. Source: the
    format of PRISM, with the reference's pattern (dp_critic.py and mm_gad_no_llm.py) corrected:
    that one accepts blank and repeated sections, and reads an answer that stands inside thinking.
    """
    if any(text.count(tag) != 1 for tag in TAGS) or CONTROL_TOKEN.search(text):
        return None
    match = _LAYOUT.fullmatch(text)
    if match is None or not all(body.strip() for body in match.groups()):
        return None
    return Sections(*match.groups())


def reference_sections(text: str) -> Sections | None:
    """The sections of a response, or None, by the reference's pattern.

    Sections in order with white space between them and around them; what is in them does not
    matter, so that it may be nothing, or further tags. Source: dp_critic.py and mm_gad_no_llm.py, a
    regular expression with lazy bodies, for which the first place where one section can end is
    always a right one. In time linear in the length.
    """
    text = text.strip()
    if not text.startswith("<caption>") or not text.endswith("</answer>"):
        return None
    think = _CAPTION_TO_THINK.search(text, len("<caption>"))
    answer = think and _THINK_TO_ANSWER.search(text, think.end())
    if think is None or answer is None:
        return None
    return Sections(
        text[len("<caption>") : think.start()],
        text[think.end() : answer.start()],
        text[answer.end() : -len("</answer>")],
    )


def sections_of(caption: str, reasoning: str) -> Sections | None:
    """The sections of an answer that a data row holds in two parts, tags included; None if they do
    not make up a valid response. The teacher's rows go through this, so that its text is made
    uniform like a student's."""
    return split_sections(f"{caption}\n{reasoning}")


def token_bytes(tokenizer: PreTrainedTokenizerFast) -> tuple[bytes, ...]:
    """The bytes that each token id stands for, special tokens as they are spelt.

    Raises ValueError if the tokenizer is not a byte-level BPE, as Qwen's is.
    """
    if not isinstance(tokenizer.backend_tokenizer.decoder, decoders.ByteLevel):
        raise ValueError(
            f"{type(tokenizer).__name__} decodes with {tokenizer.backend_tokenizer.decoder}; "
            "section boundaries need a byte-level BPE tokenizer such as Qwen3-VL's"
        )
    # imported here, so that text is split into sections without torch
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    added = {index: token.content for index, token in tokenizer.added_tokens_decoder.items()}
    table = [_REPLACEMENT] * (max(tokenizer.get_vocab().values()) + 1)
    for piece, index in tokenizer.get_vocab().items():
        if index in added:
            table[index] = added[index].encode()
        else:
            table[index] = bytes(byte_of[character] for character in piece)
    return tuple(table)


def response_text(
    ids: Seq[int],
    table: Seq[bytes],
    end_ids: Collection[int],
    hidden: Collection[int] = (),
) -> str:
    """The text of a sampled response without its end-of-turn token.

    Other control tokens stay visible, so that `split_sections` refuses them; what is not UTF-8 and
    ids outside the tokenizer's vocabulary (embedding tables are padded) become U+FFFD. hidden: ids
    that are left out wherever they stand.
    """
    body = ids[:-1] if ids and ids[-1] in end_ids else ids
    return b"".join(_pieces(body, table, hidden)).decode(errors="replace")


def caption_tokens(
    ids: Seq[int], table: Seq[bytes], caption: str, hidden: Collection[int] = ()
) -> int:
    """How many of a valid response's ids it takes until its caption section is complete.

    The last of them may bring what stands behind the section, white space or the next tag's
    beginning. caption: the section's body; hidden: as for response_text, with which the body was
    found. Source: dp_critic.py, find_text_boundary_in_tokens, which decodes every prefix.
    """
    pieces = _pieces(ids, table, hidden)
    whole, end = b"".join(pieces), 0
    for _ in range(caption.count("</caption>") + 1):
        end = whole.index(b"</caption>", end) + len(b"</caption>")
    ends = accumulate(map(len, pieces))
    return next(count for count, reached in enumerate(ends, 1) if reached >= end)


def _pieces(ids: Seq[int], table: Seq[bytes], hidden: Collection[int]) -> list[bytes]:
    return [b"" if i in hidden else table[i] if i < len(table) else _REPLACEMENT for i in ids]
