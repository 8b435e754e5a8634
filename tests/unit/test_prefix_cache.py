"""How much of their prompts engines had in their prefix caches: as they tell it, and of a step."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

from prism_megatron.rollout.sampler import cache_shares
from prism_megatron.rollout.sglang import SGLangEngine
from prism_megatron.rollout.vocabulary import Vocabulary
from prism_megatron.types import Prompt, Rollout
from tests.mock_sglang import KEY, MockSGLang, serve
from tests.tiny_models import IMAGE
from tests.unit.test_local_engine import prompts, sampling, save, tiny_model


def test_sglang_tells_it_of_every_sample(tmp_path: Path) -> None:
    """The mock caches as SGLang does: what images show counts, a sync empties the cache."""
    hf_dir = save(tiny_model(), tmp_path)
    weights = dict(tiny_model().named_parameters())
    one, two, text = prompts()
    longer = replace(one, input_ids=(*one.input_ids, 5))
    other = replace(one, images=(replace(one.images[0], key="another"),))

    async def ask(url: str, prompt: Prompt, n: int) -> list[int | None]:
        engine = SGLangEngine(url, KEY, Vocabulary.of(hf_dir))
        group = await engine.generate(prompt, sampling(n=n, max_new_tokens=2), "k")
        await engine.close()
        return [rollout.cached for rollout in group]

    server = MockSGLang(hf_dir)
    server.load(weights, 0)
    with serve(server) as url:
        found = [
            asyncio.run(ask(url, prompt, n))
            for prompt, n in ((one, 1), (two, 3), (longer, 1), (other, 1), (text, 1), (text, 1))
        ]
        server.load(weights, 1)
        found.append(asyncio.run(ask(url, one, 1)))
    before_image = one.input_ids.index(IMAGE)
    most = len(two.input_ids) - 1
    assert found == [[0], [most] * 3, [len(one.input_ids)], [before_image], [0], [2], [0]]


def test_a_step_has_shares_of_tokens_and_of_images() -> None:
    # images end before the fourth token and before the eighth
    prompt = Prompt("row", (5, IMAGE, IMAGE, 6, 7, IMAGE, IMAGE, 8, 9, 9), ())
    text = Prompt("text", (5, 6), ())

    def rollout(cached: int | None) -> Rollout:
        return Rollout((3,), (-1.0,), "stop", 0, cached=cached)

    found = [(prompt, rollout(c)) for c in (9, 7, 6, 3, 2, None)] + [(text, rollout(1))]
    assert cache_shares(found, IMAGE) == {
        "cached_share": (9 + 7 + 6 + 3 + 2 + 1) / 52,
        "cached_images": (2 + 2 + 1 + 1 + 0) / 10,
    }
    assert cache_shares([(text, rollout(0))], IMAGE) == {"cached_share": 0}
    assert cache_shares([(prompt, rollout(None))], IMAGE) == {}
    # what a sync interrupted goes on behind its own beginning, which is then part of a prompt
    assert rollout(4).followed_by(rollout(11)).cached == 4
