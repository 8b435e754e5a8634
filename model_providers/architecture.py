"""Qwen3-VL architectures, read from a Hugging Face config.json. Without torch, which takes seconds
to import.

Both dialects are read: transformers 4.57 (rope_theta and rope_scaling) and 5.x (rope_parameters).
What the file does not say is an error, since class defaults differ between transformers versions.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SECTIONS = ("perception", "reasoning")
"""What a discriminator judges: captions; thinking and answers."""


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower (transformers Qwen3VLVisionConfig)."""

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    out_hidden_size: int
    in_channels: int
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int
    num_position_embeddings: int
    deepstack_visual_indexes: tuple[int, ...]

    @property
    def patch_dim(self) -> int:
        """Values of one flattened patch."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    def work(self, frames: int, height: int, width: int) -> float:
        """What the blocks compute for an image of so many patches, beside another's: linear layers,
        and attention within each frame (multiply-adds, divided by 2 * hidden * depth)."""
        linear = 2 * self.hidden_size + self.intermediate_size
        return frames * height * width * (linear + height * width)


@dataclass(frozen=True)
class Qwen3VLConfig:
    """One Qwen3-VL, dense (num_experts=0) or Mixture-of-Experts, with or without a value head."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    num_experts: int
    top_k: int
    moe_intermediate_size: int
    dedicated: bool
    """Experts and value heads are divided between SECTIONS; otherwise one head judges both."""
    rms_norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, int, int]
    tie_word_embeddings: bool
    image_token_id: int
    video_token_id: int
    vision: VisionConfig

    @classmethod
    def from_hf(cls, path: Path | str) -> Qwen3VLConfig:
        """Read `path`/config.json; ValueError names what is missing or not supported."""
        file = Path(path) / "config.json"
        if not file.exists():
            raise FileNotFoundError(f"{file} not found; give a Hugging Face Qwen3-VL directory")
        try:
            raw = json.loads(file.read_text())
        except ValueError as error:
            raise ValueError(f"{file} is truncated or no JSON: {error}") from error
        return cls.from_dict(raw, str(file))

    @classmethod
    def from_dict(cls, raw: dict[str, Any], source: str) -> Qwen3VLConfig:
        """The same from the parsed file; `source` names it in errors."""
        kind = raw.get("model_type")
        if kind not in ("qwen3_vl", "qwen3_vl_moe"):
            raise ValueError(f"{source}: model_type is {kind!r}, wanted qwen3_vl or qwen3_vl_moe")
        text, vision = _Fields(raw, "text_config", source), _Fields(raw, "vision_config", source)
        text.expect("hidden_act", "silu")
        vision.expect("hidden_act", "gelu_pytorch_tanh")
        rope = text.values.get("rope_parameters") or text.values.get("rope_scaling") or {}
        theta = rope.get("rope_theta", text.values.get("rope_theta"))
        if theta is None or "mrope_section" not in rope:
            raise ValueError(
                f"{source}: text_config has no rope_theta or no mrope_section; defaults differ "
                "tenfold between transformers versions, so write both into rope_parameters"
            )
        if rope.get("rope_type", "default") != "default":
            raise ValueError(f"{source}: rope_type {rope['rope_type']!r} is not supported")
        moe = kind == "qwen3_vl_moe"
        if moe and (
            text.values.get("mlp_only_layers") or text.values.get("decoder_sparse_step", 1) != 1
        ):
            raise ValueError(f"{source}: mixed dense and expert layers are not supported")
        experts = text.values.get("num_experts", text.values.get("num_local_experts"))
        if moe and experts is None:
            raise ValueError(f"{source}: text_config lacks num_experts")
        found = cls(
            vocab_size=text["vocab_size"],
            hidden_size=text["hidden_size"],
            num_layers=text["num_hidden_layers"],
            num_heads=text["num_attention_heads"],
            num_kv_heads=text["num_key_value_heads"],
            head_dim=text["head_dim"],
            intermediate_size=text["intermediate_size"],
            num_experts=experts if moe else 0,
            top_k=text["num_experts_per_tok"] if moe else 0,
            moe_intermediate_size=text["moe_intermediate_size"] if moe else 0,
            dedicated=_is_dedicated(raw, text, experts if moe else 0, source),
            rms_norm_eps=text["rms_norm_eps"],
            rope_theta=float(theta),
            mrope_section=tuple(rope["mrope_section"]),
            # the top level decides: text_config's default is True even where the model unties
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            image_token_id=raw["image_token_id"],
            video_token_id=raw["video_token_id"],
            vision=VisionConfig(
                depth=vision["depth"],
                hidden_size=vision["hidden_size"],
                intermediate_size=vision["intermediate_size"],
                num_heads=vision["num_heads"],
                out_hidden_size=vision["out_hidden_size"],
                in_channels=vision["in_channels"],
                patch_size=vision["patch_size"],
                temporal_patch_size=vision["temporal_patch_size"],
                spatial_merge_size=vision["spatial_merge_size"],
                num_position_embeddings=vision["num_position_embeddings"],
                deepstack_visual_indexes=tuple(vision["deepstack_visual_indexes"]),
            ),
        )
        if wrong := list(found._contradictions()):
            raise ValueError(f"{source}: {'; '.join(wrong)}")
        return found

    def _contradictions(self) -> Iterator[str]:
        """Sizes that do not fit each other, in words."""
        vision, heads, groups = self.vision, self.num_heads, self.num_kv_heads
        if heads % groups:
            yield f"{heads} attention heads can't share {groups} key-value heads"
        if 2 * sum(self.mrope_section) != self.head_dim:
            yield (
                f"mrope_section {list(self.mrope_section)} does not add up to half of head_dim "
                f"{self.head_dim}"
            )
        if self.num_experts and not 1 <= self.top_k <= self.num_experts:
            yield f"a token can't take {self.top_k} of {self.num_experts} experts"
        indexes = [*vision.deepstack_visual_indexes]
        if indexes != sorted({*indexes} & {*range(vision.depth)}):
            yield (
                f"deepstack_visual_indexes {indexes} are not ascending numbers of the vision "
                f"tower's {vision.depth} blocks"
            )
        if vision.hidden_size % vision.num_heads:
            yield (
                f"{vision.hidden_size} channels of images do not divide by {vision.num_heads} heads"
            )
        if vision.out_hidden_size != self.hidden_size:
            yield (
                f"the vision tower gives {vision.out_hidden_size} channels to a decoder of "
                f"{self.hidden_size}"
            )
        if round(vision.num_position_embeddings**0.5) ** 2 != vision.num_position_embeddings:
            yield f"num_position_embeddings {vision.num_position_embeddings} is no square"

    @property
    def token_weights(self) -> int:
        """Weights of a decoder layer's linear layers that a token passes."""
        heads, kv_heads = self.num_heads, self.num_kv_heads
        weights = self.hidden_size * self.head_dim * (2 * heads + 2 * kv_heads)
        if self.num_experts:
            weights += self.hidden_size * self.num_experts
            return weights + 3 * self.top_k * self.hidden_size * self.moe_intermediate_size
        return weights + 3 * self.hidden_size * self.intermediate_size

    def work(self, tokens: int) -> float:
        """What the decoder computes for a sequence, beside another's: linear layers, and causal
        attention (multiply-adds a layer)."""
        return tokens * (self.token_weights + self.num_heads * self.head_dim * tokens)

    @property
    def num_deepstack(self) -> int:
        """Decoder layers that get a deepstack feature added after them."""
        return len(self.vision.deepstack_visual_indexes)

    def deepstack_left(self, layers: int) -> int:
        """Deepstack features that are still to be added after the first `layers` decoder layers;
        they travel with the hidden states."""
        return max(0, self.num_deepstack - layers)

    @property
    def value_heads(self) -> tuple[str, ...]:
        """Hugging Face names of a discriminator's heads, each [1, hidden_size]."""
        # "1" is the place of the linear layer in the reference's Sequential(Dropout, Linear)
        return tuple(f"v_head.{name}.weight" for name in (SECTIONS if self.dedicated else ("1",)))


def _is_dedicated(raw: dict[str, Any], text: _Fields, num_experts: int, source: str) -> bool:
    """What upcycling wrote down of the discriminator (checkpoint_tools.upcycle); the reference's
    checkpoints say nothing and are `shared`."""
    possible = ("shared", "dedicated") if num_experts else ("dense",)
    architecture = raw.get("prism_discriminator", {}).get("architecture", possible[0])
    if architecture not in possible:
        raise ValueError(
            f"{source}: prism_discriminator.architecture is {architecture!r}, but a model with "
            f"{num_experts} experts is {' or '.join(possible)}"
        )
    if architecture == "dedicated":
        check_dedicated(num_experts, text["num_experts_per_tok"], source)
    return bool(architecture == "dedicated")


def check_dedicated(num_experts: int, top_k: int, source: str) -> None:
    """ValueError if the experts can't be divided evenly between the sections."""
    each, rest = divmod(num_experts, len(SECTIONS))
    if rest or top_k > each:
        raise ValueError(
            f"{source}: a dedicated discriminator divides num_experts={num_experts} between "
            f"{' and '.join(SECTIONS)}, and a token takes top_k={top_k} of its section's; give an "
            "even number of experts, at least twice top_k"
        )


class _Fields:
    """A sub-dictionary whose missing keys are errors that name the file."""

    def __init__(self, raw: dict[str, Any], key: str, source: str) -> None:
        if key not in raw:
            raise ValueError(f"{source}: no {key}")
        self.values: dict[str, Any] = raw[key]
        self.where = f"{source}: {key}"

    def __getitem__(self, key: str) -> Any:
        if self.values.get(key) is None:
            raise ValueError(f"{self.where} lacks {key}, and its default is not safe to assume")
        return self.values[key]

    def expect(self, key: str, value: object) -> None:
        if self.values.get(key) != value:
            raise ValueError(f"{self.where}.{key} is {self.values.get(key)!r}, wanted {value!r}")
