"""The embedded rollout engine: a Hugging Face Qwen3-VL in this process.

prompts --prefill--> KV cache and next-token logits, one row a prompt, computed once
                         | one row a (prompt, sample), sampling.batch_size of them at once
                         v
             decode: sample a token -> forward it -> ... until every row has ended
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Literal

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    DynamicCache,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights

from prism_megatron.config.schema import Sampling
from prism_megatron.rollout.collate import collate_prompts
from prism_megatron.rollout.engine import request_keys
from prism_megatron.rollout.vocabulary import Vocabulary
from prism_megatron.rollout.weight_check import WeightCheck
from prism_megatron.types import Prompt, Rollout

# Rows that ended are cut out of the batch once so large a share of it has ended: cutting copies
# the KV cache, so doing it for every single row costs more than it saves.
_ENDED_SHARE = 0.25


@dataclass
class _Decoding:
    """State of R rows decoded together; the KV cache holds L columns.

    logits [R, vocab] float32 predict the next token, positions [R] is that token's MRoPE position
    (text: the same on all three axes), attention_mask [R, L] is 0 on the prompts' left padding.
    """

    cache: DynamicCache
    logits: Tensor
    attention_mask: Tensor
    positions: Tensor

    def select(self, rows: Tensor) -> _Decoding:
        """A copy with `rows` alone; a row may be named several times."""
        cache = DynamicCache(
            [(layer.keys[rows], layer.values[rows]) for layer in self.cache.layers]
        )
        return _Decoding(cache, self.logits[rows], self.attention_mask[rows], self.positions[rows])


class LocalEngine:
    """Samples with a dense Qwen3-VL of Hugging Face's own code; see RolloutEngine.

    Vision placeholder ids (image and video pad, vision start and end) and ids that the tokenizer
    does not have are never sampled: a response that holds a placeholder asks the trainer's forward
    for image features that do not exist. The log-probabilities returned are those of the model's
    full softmax at temperature 1, which is what the trainer recomputes, not those of the
    tempered, truncated or suppressed distribution that was sampled from.
    """

    def __init__(
        self,
        hf_dir: Path,
        *,
        seed: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        pretrained: bool = True,
    ) -> None:
        """The model of hf_dir, with its weights as version 0.

        pretrained=False: hf_dir needs no weight files; they come by load_weights, and the version
        is -1 until then. hf_dir also holds the tokenizer and generation_config.json, whose
        eos_token_id end a response; ValueError if it names none.
        """
        model = (
            load_qwen3_vl(hf_dir, dtype=dtype) if pretrained else _without_weights(hf_dir, dtype)
        )
        self._model = model.to(device).eval().requires_grad_(False)
        self._seed = seed
        self._weight_version = 0 if pretrained else -1
        self.weight_check = WeightCheck(self._model.named_parameters)
        vocabulary = Vocabulary.of(hf_dir)
        self._stop_ids = torch.tensor(vocabulary.stop, device=device)
        forbidden = torch.arange(model.config.text_config.vocab_size) >= vocabulary.size
        forbidden[list(vocabulary.forbidden)] = True
        self._forbidden = forbidden.to(device)

    @property
    def weight_version(self) -> int:
        """Version of the weights in use; -1 before any load."""
        return self._weight_version

    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Replace all weights at once, or none; see RolloutEngine.

        A tied model takes the embedding under its own name alone, as its export does. The new
        weights are collected beside the old ones, so both are in memory for a moment.
        """
        parameters = dict(self._model.named_parameters())
        staged: dict[str, Tensor] = {}
        for name, tensor in named_tensors:
            if name not in parameters or name in staged:
                problem = "came twice" if name in staged else "is not a parameter of the engine"
                raise ValueError(f"weight version {version}: {name} {problem}")
            parameter = parameters[name]
            if tensor.shape != parameter.shape:
                raise ValueError(
                    f"weight version {version}: {name} has shape {tuple(tensor.shape)}, the "
                    f"engine's has {tuple(parameter.shape)}"
                )
            staged[name] = tensor.detach().to(parameter.device, parameter.dtype, copy=True)
        if missing := parameters.keys() - staged.keys():
            raise ValueError(
                f"weight version {version}: {len(missing)} of {len(parameters)} parameters did "
                f"not come: {', '.join(sorted(missing)[:8])}"
            )
        for name, tensor in staged.items():
            parameters[name].data = tensor
        self._weight_version = version

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, step: int
    ) -> list[list[Rollout]]:
        """See RolloutEngine."""
        return self.sample(prompts, sampling, request_keys(prompts, step))

    @torch.inference_mode()
    def sample(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        keys: Sequence[str],
        stop: Event | None = None,
    ) -> list[list[Rollout]]:
        """sampling.n rollouts a prompt; each prompt and its images are computed once.

        At most sampling.batch_size rows are decoded at once, made of whole prompts where n fits.
        keys: one a prompt, from which its random numbers follow. stop: once set, from another
        thread, decoding ends after the token at hand, with finish_reason "abort".
        ValueError if a prompt has not as many image tokens as its images need.
        """
        if self._weight_version < 0:
            raise RuntimeError("the rollout engine has no weights yet: call load_weights first")
        for prompt in prompts:
            self._check_images(prompt)
        group_size = max(1, sampling.batch_size // sampling.n)
        rollouts: list[Rollout] = []
        for start in range(0, len(prompts), group_size):
            group = prompts[start : start + group_size]
            uniforms = self._uniforms(keys[start : start + group_size], sampling)
            prefilled = self._prefill(group)
            rows = torch.arange(len(group)).repeat_interleave(sampling.n)
            for batch_rows, batch_uniforms in zip(
                torch.split(rows, sampling.batch_size),
                torch.split(uniforms, sampling.batch_size),
                strict=True,
            ):
                decoding = prefilled.select(batch_rows.to(self._model.device))
                rollouts += self._decode(decoding, batch_uniforms, sampling, stop)
        return [rollouts[i : i + sampling.n] for i in range(0, len(rollouts), sampling.n)]

    def _check_images(self, prompt: Prompt) -> None:
        config = self._model.config
        merged = config.vision_config.spatial_merge_size**2
        needed = sum(math.prod(image.grid_thw) // merged for image in prompt.images)
        if (found := prompt.input_ids.count(config.image_token_id)) != needed:
            raise ValueError(
                f"row {prompt.row_id} has {found} image tokens, but its {len(prompt.images)} "
                f"images need {needed}"
            )

    def _uniforms(self, keys: Sequence[str], sampling: Sampling) -> Tensor:
        """[keys * n, max_new_tokens] float64 in [0, 1): the random number of every token."""
        rows = []
        for key in keys:
            for sample in range(sampling.n):
                name = f"{self._seed}/{key}/{sample}"
                digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
                generator = torch.Generator().manual_seed(int.from_bytes(digest))
                rows.append(
                    torch.rand(sampling.max_new_tokens, generator=generator, dtype=torch.float64)
                )
        return torch.stack(rows).to(self._model.device)

    def _prefill(self, prompts: Sequence[Prompt]) -> _Decoding:
        """Forward the prompts with their images; one row a prompt."""
        model = self._model
        batch = collate_prompts(
            prompts,
            pad_id=0,
            image_token_id=model.config.image_token_id,
            device=model.device,
        )
        token_types = batch.pop("mm_token_type_ids")
        position_ids, deltas = model.model.get_rope_index(
            batch["input_ids"],
            mm_token_type_ids=token_types,
            image_grid_thw=batch.get("image_grid_thw"),
            attention_mask=batch["attention_mask"],
        )
        cache = DynamicCache()
        output = model(
            **batch,
            position_ids=position_ids,
            past_key_values=cache,
            logits_to_keep=1,
        )
        lengths = batch["attention_mask"].sum(-1)
        return _Decoding(
            cache, output.logits[:, -1].float(), batch["attention_mask"], lengths + deltas[:, 0]
        )

    def _decode(
        self, decoding: _Decoding, uniforms: Tensor, sampling: Sampling, stop: Event | None
    ) -> list[Rollout]:
        """Sample until every row has ended or reached max_new_tokens, or `stop` is set.

        uniforms: [R, max_new_tokens]. `rows` says which of the R rows each row of `decoding` is.
        """
        device = uniforms.device
        ids = torch.zeros(uniforms.shape, dtype=torch.long, device=device)
        logprobs = torch.zeros(uniforms.shape, device=device)
        lengths = torch.full((len(uniforms),), sampling.max_new_tokens, device=device)
        rows = torch.arange(len(uniforms), device=device)
        ended = torch.zeros(len(uniforms), dtype=torch.bool, device=device)
        for column in range(sampling.max_new_tokens):
            if stop is not None and stop.is_set():
                lengths[~ended] = column
                break
            tokens = sample_tokens(
                decoding.logits.masked_fill(self._forbidden, -torch.inf),
                uniforms[rows, column],
                sampling.temperature,
                sampling.top_p,
            )
            ids[rows, column] = tokens
            chosen = decoding.logits.gather(-1, tokens[:, None])[:, 0]
            logprobs[rows, column] = chosen - decoding.logits.logsumexp(-1)
            ends = torch.isin(tokens, self._stop_ids) & ~ended[rows]
            lengths[rows[ends]] = column + 1
            ended[rows[ends]] = True
            alive = (~ended[rows]).nonzero()[:, 0]
            if not len(alive) or column + 1 == sampling.max_new_tokens:
                break
            if len(alive) <= (1 - _ENDED_SHARE) * len(rows):
                decoding, rows, tokens = decoding.select(alive), rows[alive], tokens[alive]
            self._advance(decoding, tokens)
        return self._rollouts(ids, logprobs, lengths, ended)

    def _advance(self, decoding: _Decoding, tokens: Tensor) -> None:
        """Forward one token [R] a row, in place."""
        ones = decoding.attention_mask.new_ones(len(tokens), 1)
        decoding.attention_mask = torch.cat([decoding.attention_mask, ones], dim=-1)
        output = self._model(
            input_ids=tokens[:, None],
            attention_mask=decoding.attention_mask,
            position_ids=decoding.positions[None, :, None].expand(3, -1, 1),
            past_key_values=decoding.cache,
        )
        decoding.logits = output.logits[:, -1].float()
        decoding.positions = decoding.positions + 1

    def _rollouts(
        self, ids: Tensor, logprobs: Tensor, lengths: Tensor, ended: Tensor
    ) -> list[Rollout]:
        rows = zip(ids.tolist(), logprobs.tolist(), lengths.tolist(), ended.tolist(), strict=True)
        return [
            Rollout(
                ids=tuple(row_ids[:length]),
                logprobs=tuple(row_logprobs[:length]),
                finish_reason=_finish_reason(length, len(row_ids), has_ended),
                weight_version=self._weight_version,
            )
            for row_ids, row_logprobs, length, has_ended in rows
        ]


def _finish_reason(length: int, longest: int, has_ended: bool) -> str:
    if has_ended:
        return "stop"
    return "length" if length == longest else "abort"


def sample_tokens(logits: Tensor, uniforms: Tensor, temperature: float, top_p: float) -> Tensor:
    """One token a row by inverting the cumulative distribution at a given uniform number.

    logits [R, vocab] (-inf: never), uniforms [R] float64 in [0, 1); returns [R] int64. At
    temperature 0 it is the likeliest one. top_p keeps
    the fewest most probable tokens whose mass reaches it. One number a token, whatever the batch,
    is what makes a response independent of the rows it is decoded beside.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    probs = torch.softmax(logits.double() / temperature, dim=-1)
    if top_p < 1:
        ordered, order = probs.sort(dim=-1, descending=True)
        mass_before = ordered.cumsum(-1) - ordered
        ordered = ordered.masked_fill(mass_before >= top_p, 0)
        probs = torch.zeros_like(probs).scatter(-1, order, ordered)
    cumulative = probs.cumsum(-1)
    targets = uniforms * cumulative[:, -1]
    return torch.searchsorted(cumulative, targets[:, None], right=True)[:, 0]


def load_qwen3_vl(hf_dir: Path, *, dtype: torch.dtype | Literal["auto"]) -> PreTrainedModel:
    """from_pretrained that takes no missing, surplus or misshapen weight: ValueError naming them.

    dtype "auto" is the one that the weights were saved in.
    """
    model, info = AutoModelForImageTextToText.from_pretrained(
        hf_dir, dtype=dtype, output_loading_info=True
    )
    problems = {name: sorted(map(str, keys)) for name, keys in info.items() if keys}
    if problems:
        found = "; ".join(f"{name}: {', '.join(keys[:8])}" for name, keys in problems.items())
        raise ValueError(f"the weights in {hf_dir} do not fit its config.json: {found}")
    return model


def _without_weights(hf_dir: Path, dtype: torch.dtype) -> PreTrainedModel:
    with no_init_weights():
        model = AutoModelForImageTextToText.from_config(
            AutoConfig.from_pretrained(hf_dir), dtype=dtype
        )
    model.tie_weights()
    return model
