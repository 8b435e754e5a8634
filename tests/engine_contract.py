"""What every EngineClient keeps to, as cases that a client is handed to.

The client has the weights of tests.unit.test_local_engine.tiny_model(seed=99) as version 4, and can
take one request after the other; each case leaves it as it was.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
import torch

from prism_megatron.rollout.engine import EngineClient
from prism_megatron.types import Prompt, Rollout
from tests.tiny_models import VISION_END, VISION_START, VOCAB
from tests.unit.test_local_engine import (
    FORBIDDEN,
    STOP_IDS,
    full_forward_logprobs,
    image,
    prompts,
    sampling,
    tiny_model,
    vision_block,
)

VERSION = 4
WEIGHTS_SEED = 99
LITERAL_IMAGE = 60
"""An id of plain text, whose text a tokenizer may well spell `<image>`."""


def odd_prompts() -> list[Prompt]:
    """The text `<image>` without an image and beside one, extreme aspect ratios, many images."""
    flat, high, least = (1, 2, 40), (1, 30, 2), (1, 2, 2)
    few = [image(f"i{i}", least) for i in range(5)]
    blocks = [token for _ in few for token in vision_block(least)]
    return [
        Prompt("literal", (1, LITERAL_IMAGE, 2), ()),
        Prompt("both", (LITERAL_IMAGE, *vision_block(flat), LITERAL_IMAGE), (image("f", flat),)),
        Prompt("high", (3, *vision_block(high), 4), (image("h", high),)),
        Prompt("many", (*blocks, 5), tuple(few)),
        Prompt("empty block", (6, VISION_START, VISION_END, 7), ()),
    ]


def check_form(group: list[Rollout], n: int, longest: int, tokens: int) -> None:
    """tokens: of the prompt."""
    assert len(group) == n
    for rollout in group:
        assert 1 <= len(rollout.ids) <= longest
        assert len(rollout.logprobs) == len(rollout.ids)
        assert rollout.weight_version == VERSION
        assert not STOP_IDS & set(rollout.ids[:-1])
        assert rollout.cached is None or 0 <= rollout.cached < tokens
        if rollout.finish_reason == "stop":
            assert rollout.ids[-1] in STOP_IDS
        else:
            assert rollout.finish_reason == "length"
            assert len(rollout.ids) == longest


async def answers_have_their_form(client: EngineClient) -> None:
    for prompt in [*prompts(), *odd_prompts()]:
        group = await client.generate(prompt, sampling(), "k")
        check_form(group, 3, 12, len(prompt.input_ids))


async def logprobs_are_those_of_the_ids_that_came(client: EngineClient) -> None:
    model = tiny_model(seed=WEIGHTS_SEED)
    for prompt in [*prompts(), *odd_prompts()]:
        for rollout in await client.generate(prompt, sampling(n=2), "k"):
            wanted = full_forward_logprobs(model, prompt, rollout)
            torch.testing.assert_close(torch.tensor(rollout.logprobs), wanted, atol=1e-4, rtol=0)


async def placeholders_are_never_sampled(client: EngineClient) -> None:
    hot = sampling(n=64, temperature=1000.0)
    for prompt in prompts():
        group = await client.generate(prompt, hot, "k")
        sampled = {token for rollout in group for token in rollout.ids}
        assert len(sampled) > VOCAB / 2
        assert not sampled & FORBIDDEN
        assert {rollout.finish_reason for rollout in group} == {"stop", "length"}


async def the_key_makes_the_random_numbers(client: EngineClient) -> None:
    async def ask(key: str) -> list[Rollout]:
        return await client.generate(prompts()[0], sampling(), key)

    first, again, other = await ask("a"), await ask("a"), await ask("b")
    assert first == again
    assert {r.ids for r in first}.isdisjoint(r.ids for r in other)


async def requests_at_the_same_time_get_their_own_answers(client: EngineClient) -> None:
    """Cold, so that the random numbers make no difference."""
    cold = sampling(temperature=1e-4)

    async def ids(prompt: Prompt) -> list[tuple[int, ...]]:
        return [rollout.ids for rollout in await client.generate(prompt, cold, "k")]

    asked = [*prompts(), *odd_prompts()]
    alone = [await ids(prompt) for prompt in asked]
    assert await asyncio.gather(*map(ids, asked)) == alone
    assert len({tuple(answer) for answer in alone}) > len(asked) / 2


async def the_version_is_told_while_it_generates(client: EngineClient) -> None:
    long = sampling(max_new_tokens=200, n=64, temperature=1e-3)
    request = asyncio.create_task(client.generate(prompts()[2], long, "k"))
    await asyncio.sleep(0.1)
    await client.health()
    assert await client.weight_version() == VERSION
    assert not request.done()
    await request


async def abort_returns_what_was_sampled(client: EngineClient) -> None:
    """What came is the beginning of what would have come, and the engine goes on."""
    prompt, long = prompts()[2], sampling(max_new_tokens=300, n=2, temperature=1e-3)
    whole = await client.generate(prompt, long, "k")
    assert [rollout.finish_reason for rollout in whole] == ["length"] * 2
    request = asyncio.create_task(client.generate(prompt, long, "k"))
    await asyncio.sleep(0.2)
    await client.abort()
    cut = await request
    assert [rollout.finish_reason for rollout in cut] == ["abort"] * 2
    for part, rollout in zip(cut, whole, strict=True):
        assert len(part.logprobs) == len(part.ids) < 300
        assert part.ids == rollout.ids[: len(part.ids)]
        assert part.weight_version == VERSION
    again = await client.generate(prompt, long, "k")
    assert [rollout.ids for rollout in again] == [rollout.ids for rollout in whole]


async def a_prompt_without_its_image_is_refused(client: EngineClient) -> None:
    for prompt in prompts()[:2]:
        wrong = Prompt("odd one", prompt.input_ids, prompt.images[1:])
        with pytest.raises(ValueError, match="odd one"):
            await client.generate(wrong, sampling(), "k")
    await answers_have_their_form(client)


CASES: list[Callable[[EngineClient], Awaitable[None]]] = [
    answers_have_their_form,
    logprobs_are_those_of_the_ids_that_came,
    placeholders_are_never_sampled,
    requests_at_the_same_time_get_their_own_answers,
    the_version_is_told_while_it_generates,
    abort_returns_what_was_sampled,
    a_prompt_without_its_image_is_refused,
]
"""Of every client."""

SEEDED: list[Callable[[EngineClient], Awaitable[None]]] = [the_key_makes_the_random_numbers]
"""Of the clients of engines whose random numbers the asker chooses."""
