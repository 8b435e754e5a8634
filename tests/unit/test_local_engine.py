"""LocalEngine against Hugging Face's own full forward, and its sampling rules."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3VLForConditionalGeneration,
)

from prism_megatron.config.schema import Sampling
from prism_megatron.rollout.local import LocalEngine, sample_tokens
from prism_megatron.types import Prompt, Rollout, VisualInputs
from tests import tiny_models
from tests.tiny_models import IMAGE, VIDEO, VISION_END, VISION_START, VOCAB

IM_END, ENDOFTEXT, TOKENIZER_SIZE = 195, 196, 202
STOP_IDS = {IM_END, ENDOFTEXT}
FORBIDDEN = {VISION_START, VISION_END, IMAGE, VIDEO, *range(TOKENIZER_SIZE, VOCAB)}


def tiny_model(*, tied: bool = False, seed: int = 0) -> Qwen3VLForConditionalGeneration:
    model = tiny_models.build("dense", tied=tied, seed=seed)
    model.generation_config = GenerationConfig(
        eos_token_id=[IM_END, ENDOFTEXT], pad_token_id=ENDOFTEXT
    )
    return model


def save(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    vocabulary = {f"t{i}": i for i in range(TOKENIZER_SIZE)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="t0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def hf_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny_model(), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def engine(hf_dir: Path) -> LocalEngine:
    return LocalEngine(hf_dir, seed=7)


def image(key: str, grid: tuple[int, int, int]) -> VisualInputs:
    generator = torch.Generator().manual_seed(grid[1] * 100 + grid[2])
    patches = grid[0] * grid[1] * grid[2]
    pixels = torch.randn(patches, 3 * 2 * 8 * 8, generator=generator)
    # exact in the precision that they travel to a server in
    return VisualInputs(key, pixels.bfloat16().float(), grid)


def vision_block(grid: tuple[int, int, int]) -> list[int]:
    return [VISION_START, *[IMAGE] * (grid[0] * grid[1] * grid[2] // 4), VISION_END]


def prompts() -> list[Prompt]:
    """One image, two images of other sizes, text alone; all of other lengths."""
    wide, tall, square = (1, 4, 10), (1, 8, 2), (1, 6, 6)
    return [
        Prompt("one", (1, 2, *vision_block(wide), 3, 4, 5), (image("w", wide),)),
        Prompt(
            "two",
            (6, *vision_block(tall), 7, *vision_block(square), 8, 9),
            (image("t", tall), image("s", square)),
        ),
        Prompt("text", (10, 11, 12), ()),
    ]


def sampling(**changes: object) -> Sampling:
    return Sampling(**{"n": 3, "max_new_tokens": 12, "batch_size": 64, **changes})


def full_forward_logits(model: PreTrainedModel, prompt: Prompt, response: Sequence[int]) -> Tensor:
    """[len(response), vocab]: logits that predict the response, from one uncached forward."""
    input_ids = torch.tensor([[*prompt.input_ids, *response]])
    images = {}
    if prompt.images:
        images = {
            "pixel_values": torch.cat([one.pixel_values for one in prompt.images]),
            "image_grid_thw": torch.tensor([one.grid_thw for one in prompt.images]),
        }
    with torch.no_grad():
        logits = model(
            input_ids=input_ids, mm_token_type_ids=(input_ids == IMAGE).long(), **images
        ).logits[0]
    return logits[len(prompt.input_ids) - 1 : -1]


def full_forward_logprobs(model: PreTrainedModel, prompt: Prompt, rollout: Rollout) -> Tensor:
    logits = full_forward_logits(model, prompt, rollout.ids)
    return logits.log_softmax(-1).gather(-1, torch.tensor(rollout.ids)[:, None])[:, 0]


@pytest.mark.parametrize("which", [[0], [1], [2], [0, 1, 2], [2, 1, 0, 1]])
@pytest.mark.parametrize("batch_size", [2, 64])
def test_logprobs_equal_a_full_forward_of_prompt_and_response(
    hf_dir: Path, engine: LocalEngine, which: list[int], batch_size: int
) -> None:
    model = Qwen3VLForConditionalGeneration.from_pretrained(hf_dir)
    batch = [prompts()[i] for i in which]
    groups = engine.generate(batch, sampling(batch_size=batch_size), step=0)
    assert [len(group) for group in groups] == [3] * len(batch)
    for prompt, group in zip(batch, groups, strict=True):
        for rollout in group:
            expected = full_forward_logprobs(model, prompt, rollout)
            torch.testing.assert_close(torch.tensor(rollout.logprobs), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("changes", [{"temperature": 0.6}, {"top_p": 0.7}])
def test_logprobs_are_those_of_the_untempered_untruncated_softmax(
    hf_dir: Path, engine: LocalEngine, changes: dict[str, float]
) -> None:
    model = Qwen3VLForConditionalGeneration.from_pretrained(hf_dir)
    [[rollout]] = engine.generate(prompts()[:1], sampling(n=1, **changes), step=1)
    expected = full_forward_logprobs(model, prompts()[0], rollout)
    torch.testing.assert_close(torch.tensor(rollout.logprobs), expected, atol=1e-4, rtol=0)


def test_a_cold_temperature_follows_the_argmax(hf_dir: Path, engine: LocalEngine) -> None:
    model = Qwen3VLForConditionalGeneration.from_pretrained(hf_dir)
    for prompt, [rollout] in zip(
        prompts(), engine.generate(prompts(), sampling(n=1, temperature=1e-4), 0), strict=True
    ):
        logits = full_forward_logits(model, prompt, rollout.ids)
        logits[:, list(FORBIDDEN)] = -torch.inf
        assert rollout.ids == tuple(logits.argmax(-1).tolist())


def test_placeholders_and_ids_without_a_token_are_never_sampled(engine: LocalEngine) -> None:
    hot = sampling(n=64, temperature=1000.0)
    sampled = {
        token
        for group in engine.generate(prompts(), hot, step=0)
        for rollout in group
        for token in rollout.ids
    }
    assert sampled == set(range(VOCAB)) - FORBIDDEN


def test_stop_ids_end_a_response_and_nothing_else_does(engine: LocalEngine) -> None:
    groups = engine.generate(prompts(), sampling(n=64, temperature=1000.0), step=0)
    rollouts = [rollout for group in groups for rollout in group]
    assert {rollout.finish_reason for rollout in rollouts} == {"stop", "length"}
    for rollout in rollouts:
        assert not STOP_IDS & set(rollout.ids[:-1])
        assert len(rollout.ids) == len(rollout.logprobs)
        if rollout.finish_reason == "stop":
            assert rollout.ids[-1] in STOP_IDS
        else:
            assert rollout.ids[-1] not in STOP_IDS
            assert len(rollout.ids) == 12


def test_a_stop_in_the_last_column_counts_as_stop(engine: LocalEngine) -> None:
    hot = sampling(n=256, temperature=1000.0, max_new_tokens=1, batch_size=256)
    [group] = engine.generate(prompts()[2:], hot, step=0)
    for rollout in group:
        assert len(rollout.ids) == 1
        assert (rollout.finish_reason == "stop") == (rollout.ids[0] in STOP_IDS)
    assert any(rollout.finish_reason == "stop" for rollout in group)


def ids(groups: list[list[Rollout]]) -> list[list[tuple[int, ...]]]:
    return [[rollout.ids for rollout in group] for group in groups]


def test_a_prompt_gets_the_same_responses_in_any_company(engine: LocalEngine) -> None:
    together = ids(engine.generate(prompts(), sampling(n=5), step=3))
    alone = [ids(engine.generate([prompt], sampling(n=5), step=3))[0] for prompt in prompts()]
    backwards = ids(engine.generate(prompts()[::-1], sampling(n=5, batch_size=3), step=3))
    fewer = ids(engine.generate(prompts(), sampling(n=2), step=3))
    assert together == alone == backwards[::-1]
    assert fewer == [group[:2] for group in together]


def test_step_seed_sample_and_repetition_change_the_responses(
    hf_dir: Path, engine: LocalEngine
) -> None:
    prompt = prompts()[0]
    first, again = ids(engine.generate([prompt, prompt], sampling(), step=0))
    [other_step] = ids(engine.generate([prompt], sampling(), step=1))
    [other_seed] = ids(LocalEngine(hf_dir, seed=8).generate([prompt], sampling(), step=0))
    assert len(set(first)) == 3
    assert len({tuple(group) for group in (first, again, other_step, other_seed)}) == 4


def test_sampled_frequencies_are_the_softmax() -> None:
    logits = torch.tensor([0.1, 0.5, 0.25, 0.15]).log().expand(1000, -1)
    uniforms = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    counts = sample_tokens(logits, uniforms, 1.0, 1.0).bincount(minlength=4)
    assert counts.tolist() == [100, 500, 250, 150]


@pytest.mark.parametrize(
    ("temperature", "top_p", "kept"),
    [
        (1.0, 0.5, [0, 1000, 0, 0]),
        (1.0, 0.51, [0, 667, 333, 0]),
        (1.0, 0.9, [0, 556, 278, 166]),
        (0.5, 1.0, [29, 724, 182, 65]),
        (0.0, 1.0, [0, 1000, 0, 0]),
    ],
)
def test_temperature_and_top_p(temperature: float, top_p: float, kept: list[int]) -> None:
    logits = torch.tensor([0.1, 0.5, 0.25, 0.15]).log().expand(1000, -1)
    uniforms = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    counts = sample_tokens(logits, uniforms, temperature, top_p).bincount(minlength=4)
    assert torch.allclose(counts.float(), torch.tensor(kept).float(), atol=1)


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_the_ends_of_the_unit_interval_never_pick_an_impossible_token(uniform: float) -> None:
    logits = torch.tensor([[-torch.inf, 0.3, 1.2, -torch.inf]])
    [token] = sample_tokens(logits, torch.tensor([uniform], dtype=torch.float64), 1.0, 1.0).tolist()
    assert token == (1 if uniform == 0 else 2)


def other_weights() -> dict[str, Tensor]:
    return dict(tiny_model(seed=99).named_parameters())


def test_loaded_weights_are_sampled_with_and_versioned(hf_dir: Path) -> None:
    engine = LocalEngine(hf_dir, seed=7)
    assert engine.weight_version == 0
    weights = other_weights()
    engine.load_weights(weights.items(), version=5)
    [[rollout, *_]] = engine.generate(prompts()[:1], sampling(), step=0)
    assert rollout.weight_version == engine.weight_version == 5
    expected = full_forward_logprobs(tiny_model(seed=99), prompts()[0], rollout)
    torch.testing.assert_close(torch.tensor(rollout.logprobs), expected, atol=1e-4, rtol=0)


def test_a_mixture_of_experts_is_sampled_from(tmp_path: Path) -> None:
    """From a directory, and from weights that come later."""
    model = tiny_models.build("moe", seed=3)
    model.generation_config = GenerationConfig(eos_token_id=[IM_END], pad_token_id=ENDOFTEXT)
    path = save(model, tmp_path)
    stored, loaded = LocalEngine(path, seed=7), LocalEngine(path, seed=7, pretrained=False)
    loaded.load_weights(model.named_parameters(), 0)
    found = stored.generate(prompts(), sampling(), step=0)
    others = loaded.generate(prompts(), sampling(), step=0)
    for prompt, group, other in zip(prompts(), found, others, strict=True):
        assert [rollout.ids for rollout in group] == [rollout.ids for rollout in other]
        for rollout in group:
            expected = full_forward_logprobs(model, prompt, rollout)
            torch.testing.assert_close(torch.tensor(rollout.logprobs), expected, atol=1e-4, rtol=0)


def test_the_engine_keeps_its_weights_while_the_trainer_goes_on(hf_dir: Path) -> None:
    engine = LocalEngine(hf_dir, seed=7)
    weights = other_weights()
    engine.load_weights(weights.items(), version=1)
    before = engine.generate(prompts(), sampling(), step=0)
    with torch.no_grad():
        for tensor in weights.values():
            tensor.zero_()
    assert engine.generate(prompts(), sampling(), step=0) == before


def test_an_engine_without_weights_refuses_to_sample_until_it_has_them(tmp_path: Path) -> None:
    folder = save(tiny_model(seed=99), tmp_path)
    [weight_file] = folder.glob("*.safetensors")
    weight_file.unlink()
    engine = LocalEngine(folder, seed=7, pretrained=False)
    assert engine.weight_version == -1
    with pytest.raises(RuntimeError, match="load_weights first"):
        engine.generate(prompts(), sampling(), step=0)
    engine.load_weights(other_weights().items(), version=0)
    [[rollout, *_]] = engine.generate(prompts()[:1], sampling(), step=0)
    expected = full_forward_logprobs(tiny_model(seed=99), prompts()[0], rollout)
    torch.testing.assert_close(torch.tensor(rollout.logprobs), expected, atol=1e-4, rtol=0)


Q_PROJ = "model.language_model.layers.1.self_attn.q_proj.weight"


def broken_stream(kind: str) -> list[tuple[str, Tensor]]:
    weights = other_weights()
    if kind == "missing":
        del weights[Q_PROJ]
    if kind == "surplus":
        weights[Q_PROJ + "_extra"] = torch.zeros(3)
    if kind == "shape":
        weights[Q_PROJ] = weights[Q_PROJ].T
    repeated = [(Q_PROJ, weights[Q_PROJ])] if kind == "repeated" else []
    return [*weights.items(), *repeated]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", f"1 of 110 parameters did not come: {Q_PROJ}"),
        ("surplus", f"{Q_PROJ}_extra is not a parameter"),
        ("repeated", f"{Q_PROJ} came twice"),
        ("shape", rf"{Q_PROJ} has shape \(56, 96\), the engine's has \(96, 56\)"),
    ],
)
def test_a_broken_stream_is_refused_and_changes_nothing(
    hf_dir: Path, kind: str, message: str
) -> None:
    engine = LocalEngine(hf_dir, seed=7)
    before = engine.generate(prompts(), sampling(), step=0)
    with pytest.raises(ValueError, match=message):
        engine.load_weights(broken_stream(kind), version=1)
    assert engine.weight_version == 0
    assert engine.generate(prompts(), sampling(), step=0) == before


def test_a_tied_model_takes_the_embedding_once(tmp_path: Path) -> None:
    folder = save(tiny_model(tied=True), tmp_path)
    engine = LocalEngine(folder, seed=7, pretrained=False)
    weights = dict(tiny_model(tied=True, seed=99).named_parameters())
    assert "lm_head.weight" not in weights
    engine.load_weights(weights.items(), version=2)
    [[rollout, *_]] = engine.generate(prompts()[:1], sampling(), step=0)
    expected = full_forward_logprobs(tiny_model(tied=True, seed=99), prompts()[0], rollout)
    torch.testing.assert_close(torch.tensor(rollout.logprobs), expected, atol=1e-4, rtol=0)


def test_weights_that_do_not_fit_the_config_are_refused(tmp_path: Path) -> None:
    model = tiny_model()
    weights = model.state_dict()
    del weights[Q_PROJ]
    save(model, tmp_path)
    model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(ValueError, match=f"missing_keys: {Q_PROJ}"):
        LocalEngine(tmp_path, seed=7)


def test_a_model_without_a_stop_id_is_refused(tmp_path: Path) -> None:
    model = tiny_model()
    model.generation_config = GenerationConfig()
    save(model, tmp_path)
    with pytest.raises(ValueError, match="no eos_token_id"):
        LocalEngine(tmp_path, seed=7)
