"""The one table between Hugging Face and Megatron weights of Qwen3-VL, read in both directions.

Each rule names a Megatron parameter, the Hugging Face tensors that it is made of, how the full
tensors translate (`Transform.to_megatron`, `.to_hf`) and how the Megatron tensor is split over the
tensor-parallel ranks (`.shards`, `.join`). Pipeline and expert parallelism only decide which rank
holds a parameter. Checkpoint import and export, weight sync and the embedded engine all use it; a
missing or surplus name is an error.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model_providers import fp8_weights
from model_providers.architecture import SECTIONS, Qwen3VLConfig
from model_providers.qwen3_vl import Head, Qwen3VLChunk, Qwen3VLModel, padded_vocab_size


class Weights(Mapping[str, Tensor]):
    """Tensors under their Hugging Face names, read only when asked for; fused experts as
    [experts, 2 * ffn, hidden] and [experts, hidden, ffn], whatever layout they are stored in."""

    @abstractmethod
    def like(self, name: str) -> Tensor:
        """Shape and dtype, as a meta tensor."""

    @abstractmethod
    def expert(self, name: str, index: int) -> Tensor:
        """One slice of a fused expert tensor, without reading the others."""


class Transform:
    """A tensor that is the same on both sides and whole on every tensor-parallel rank."""

    dim: int | None = None
    """Dimension that the ranks split, and that `join` and `to_hf` move slices along; the others
    stay as they are. None: the whole tensor is one slice."""

    def to_megatron(self, tensors: list[Tensor], config: Qwen3VLConfig) -> Tensor:
        return tensors[0]

    def to_hf(self, tensor: Tensor, config: Qwen3VLConfig) -> list[Tensor]:
        return [tensor]

    def shards(self, tensor: Tensor, parts: int) -> list[Tensor]:
        return [tensor] * parts

    def join(self, shards: list[Tensor]) -> Tensor:
        return shards[0]


class Split(Transform):
    """Split evenly along one dimension: 0 for column-parallel layers, 1 for row-parallel ones."""

    def __init__(self, dim: int) -> None:
        self.dim = dim

    def shards(self, tensor: Tensor, parts: int) -> list[Tensor]:
        return list(tensor.chunk(parts, dim=self.dim))

    def join(self, shards: list[Tensor]) -> Tensor:
        return torch.cat(shards, dim=self.dim)


class Vocabulary(Split):
    """Rows padded with zeros until the tensor-parallel ranks divide them; the padding is dropped
    on the way out."""

    def __init__(self) -> None:
        super().__init__(0)

    def shards(self, tensor: Tensor, parts: int) -> list[Tensor]:
        missing = padded_vocab_size(tensor.shape[0], parts) - tensor.shape[0]
        return super().shards(nn.functional.pad(tensor, (0, 0, 0, missing)), parts)

    def to_hf(self, tensor: Tensor, config: Qwen3VLConfig) -> list[Tensor]:
        return [tensor[: config.vocab_size]]


class GroupedQKV(Split):
    """q, k, v -> rows grouped by key-value head: [its query heads, k, v] for each."""

    def __init__(self) -> None:
        super().__init__(0)

    def to_megatron(self, tensors: list[Tensor], config: Qwen3VLConfig) -> Tensor:
        groups = config.num_kv_heads
        return torch.cat([t.unflatten(0, (groups, -1)) for t in tensors], dim=1).flatten(0, 1)

    def to_hf(self, tensor: Tensor, config: Qwen3VLConfig) -> list[Tensor]:
        queries = config.num_heads // config.num_kv_heads
        grouped = tensor.unflatten(0, (config.num_kv_heads, -1))
        sizes = [queries * config.head_dim, config.head_dim, config.head_dim]
        return [part.flatten(0, 1) for part in grouped.split(sizes, dim=1)]


class VisionQKV(Split):
    """The tower's fused [q; k; v], weight or bias -> [q_h, k_h, v_h] head by head."""

    def __init__(self) -> None:
        super().__init__(0)

    def to_megatron(self, tensors: list[Tensor], config: Qwen3VLConfig) -> Tensor:
        heads = config.vision.num_heads
        return tensors[0].unflatten(0, (3, heads, -1)).transpose(0, 1).flatten(0, 2)

    def to_hf(self, tensor: Tensor, config: Qwen3VLConfig) -> list[Tensor]:
        heads = config.vision.num_heads
        return [tensor.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)]


class GatedUp(Split):
    """gate and up -> [gate; up]; a rank's shard is [its gate rows; its up rows]."""

    def __init__(self) -> None:
        super().__init__(0)

    def to_megatron(self, tensors: list[Tensor], config: Qwen3VLConfig) -> Tensor:
        return torch.cat(tensors)

    def to_hf(self, tensor: Tensor, config: Qwen3VLConfig) -> list[Tensor]:
        return list(tensor.chunk(2))

    def shards(self, tensor: Tensor, parts: int) -> list[Tensor]:
        halves = [half.chunk(parts) for half in tensor.chunk(2)]
        return [torch.cat(pair) for pair in zip(*halves, strict=True)]

    def join(self, shards: list[Tensor]) -> Tensor:
        halves = [shard.chunk(2) for shard in shards]
        return torch.cat([half for side in zip(*halves, strict=True) for half in side])


class FusedGatedUp(GatedUp):
    """One expert's [gate; up], fused on the Hugging Face side too."""

    def to_megatron(self, tensors: list[Tensor], config: Qwen3VLConfig) -> Tensor:
        return tensors[0]

    def to_hf(self, tensor: Tensor, config: Qwen3VLConfig) -> list[Tensor]:
        return [tensor]


class Patches(Transform):
    """Conv3d kernel [h, 3, t, p, p] <-> the same as a matrix [h, 3 * t * p * p]."""

    def to_megatron(self, tensors: list[Tensor], config: Qwen3VLConfig) -> Tensor:
        return tensors[0].flatten(1)

    def to_hf(self, tensor: Tensor, config: Qwen3VLConfig) -> list[Tensor]:
        v = config.vision
        shape = (v.in_channels, v.temporal_patch_size, v.patch_size, v.patch_size)
        return [tensor.unflatten(1, shape)]


@dataclass(frozen=True)
class Rule:
    """Megatron name and Hugging Face names, with {L} for the layer."""

    megatron: tuple[str, ...]
    """The same parameter as each backend's layers name it."""
    hf: tuple[str, ...]
    transform: Transform
    """Of one expert where they are experts."""
    experts: bool = False
    """Whether these are all experts of a layer, [experts, ...], of which each rank holds some."""


SAME = Transform()
_LAYER, _HF_LAYER = "language_model.decoder.layers.{L}.", "model.language_model.layers.{L}."
_BLOCK, _HF_BLOCK = "vision_model.decoder.layers.{L}.", "model.visual.blocks.{L}."


def _merger(megatron: str, hf: str) -> list[Rule]:
    return [
        Rule((megatron + "norm.weight",), (hf + "norm.weight",), SAME),
        Rule((megatron + "norm.bias",), (hf + "norm.bias",), SAME),
        Rule((megatron + "linear_fc1.weight",), (hf + "linear_fc1.weight",), Split(0)),
        Rule((megatron + "linear_fc1.bias",), (hf + "linear_fc1.bias",), Split(0)),
        Rule((megatron + "linear_fc2.weight",), (hf + "linear_fc2.weight",), Split(1)),
        Rule((megatron + "linear_fc2.bias",), (hf + "linear_fc2.bias",), SAME),
    ]


def _norm(layer: str, own: str, fused_into: str, hf: str, *parts: str) -> list[Rule]:
    """A norm before a linear layer, which Transformer Engine fuses into that layer."""
    return [
        Rule((f"{layer}{own}.{part}", f"{layer}{fused_into}.layer_norm_{part}"), (hf + part,), SAME)
        for part in parts
    ]


RULES: tuple[Rule, ...] = (
    Rule(
        ("language_model.embedding.word_embeddings.weight",),
        ("model.language_model.embed_tokens.weight",),
        Vocabulary(),
    ),
    Rule(("language_model.output_layer.weight",), ("lm_head.weight",), Vocabulary()),
    # the name that the reference's value head has in its shards
    Rule(("language_model.score_head.weight",), ("v_head.1.weight",), SAME),
    *(
        Rule((f"language_model.score_head.{name}.weight",), (f"v_head.{name}.weight",), SAME)
        for name in SECTIONS
    ),
    Rule(
        ("language_model.decoder.final_layernorm.weight",),
        ("model.language_model.norm.weight",),
        SAME,
    ),
    *_norm(
        _LAYER,
        "input_layernorm",
        "self_attention.linear_qkv",
        _HF_LAYER + "input_layernorm.",
        "weight",
    ),
    Rule(
        (_LAYER + "self_attention.linear_qkv.weight",),
        tuple(f"{_HF_LAYER}self_attn.{x}_proj.weight" for x in "qkv"),
        GroupedQKV(),
    ),
    Rule(
        (_LAYER + "self_attention.q_layernorm.weight",),
        (_HF_LAYER + "self_attn.q_norm.weight",),
        SAME,
    ),
    Rule(
        (_LAYER + "self_attention.k_layernorm.weight",),
        (_HF_LAYER + "self_attn.k_norm.weight",),
        SAME,
    ),
    Rule(
        (_LAYER + "self_attention.linear_proj.weight",),
        (_HF_LAYER + "self_attn.o_proj.weight",),
        Split(1),
    ),
    *_norm(
        _LAYER,
        "pre_mlp_layernorm",
        "mlp.linear_fc1",
        _HF_LAYER + "post_attention_layernorm.",
        "weight",
    ),
    Rule(
        (_LAYER + "mlp.linear_fc1.weight",),
        (_HF_LAYER + "mlp.gate_proj.weight", _HF_LAYER + "mlp.up_proj.weight"),
        GatedUp(),
    ),
    Rule((_LAYER + "mlp.linear_fc2.weight",), (_HF_LAYER + "mlp.down_proj.weight",), Split(1)),
    Rule((_LAYER + "mlp.router.weight",), (_HF_LAYER + "mlp.gate.weight",), SAME),
    Rule(
        (_LAYER + "mlp.experts.linear_fc1.weight",),
        (_HF_LAYER + "mlp.experts.gate_up_proj",),
        FusedGatedUp(),
        experts=True,
    ),
    Rule(
        (_LAYER + "mlp.experts.linear_fc2.weight",),
        (_HF_LAYER + "mlp.experts.down_proj",),
        Split(1),
        experts=True,
    ),
    Rule(
        ("vision_model.patch_embed.weight",), ("model.visual.patch_embed.proj.weight",), Patches()
    ),
    Rule(("vision_model.patch_embed.bias",), ("model.visual.patch_embed.proj.bias",), SAME),
    Rule(("vision_model.pos_embed.weight",), ("model.visual.pos_embed.weight",), SAME),
    *_norm(
        _BLOCK,
        "input_layernorm",
        "self_attention.linear_qkv",
        _HF_BLOCK + "norm1.",
        "weight",
        "bias",
    ),
    *(
        Rule(
            (f"{_BLOCK}self_attention.linear_qkv.{part}",),
            (f"{_HF_BLOCK}attn.qkv.{part}",),
            VisionQKV(),
        )
        for part in ("weight", "bias")
    ),
    Rule(
        (_BLOCK + "self_attention.linear_proj.weight",), (_HF_BLOCK + "attn.proj.weight",), Split(1)
    ),
    Rule((_BLOCK + "self_attention.linear_proj.bias",), (_HF_BLOCK + "attn.proj.bias",), SAME),
    *_norm(_BLOCK, "pre_mlp_layernorm", "mlp.linear_fc1", _HF_BLOCK + "norm2.", "weight", "bias"),
    Rule((_BLOCK + "mlp.linear_fc1.weight",), (_HF_BLOCK + "mlp.linear_fc1.weight",), Split(0)),
    Rule((_BLOCK + "mlp.linear_fc1.bias",), (_HF_BLOCK + "mlp.linear_fc1.bias",), Split(0)),
    Rule((_BLOCK + "mlp.linear_fc2.weight",), (_HF_BLOCK + "mlp.linear_fc2.weight",), Split(1)),
    Rule((_BLOCK + "mlp.linear_fc2.bias",), (_HF_BLOCK + "mlp.linear_fc2.bias",), SAME),
    *_merger("vision_model.merger.", "model.visual.merger."),
    *_merger("vision_model.deepstack_merger_list.{L}.", "model.visual.deepstack_merger_list.{L}."),
)


def _pattern(template: str) -> re.Pattern[str]:
    escaped = re.escape(template).replace(r"\{L\}", r"(?P<L>\d+)")
    return re.compile(escaped + "$")


_PATTERNS = [(_pattern(name), rule) for rule in RULES for name in rule.megatron]


@dataclass(frozen=True, order=True)
class Task:
    """One shard of one parameter of the whole model, the same on every rank that holds it."""

    hf: tuple[str, ...]
    """Hugging Face names, layers numbered over all stages."""
    expert: int
    """Index in the fused expert tensor, of the first where it is several; -1 for other
    parameters."""
    part: int
    """Which of `parts` shards; the only one where tensor-parallel ranks hold copies."""
    parts: int
    shape: tuple[int, ...]
    """Shape of the shard; of several experts' [experts, ...]."""
    dtype: str

    @property
    def stacked(self) -> bool:
        """Whether it is several experts, whose matrices have an axis more than one's."""
        return self.expert >= 0 and len(self.shape) == 3

    @property
    def experts(self) -> int:
        return self.shape[0] if self.stacked else 1

    @property
    def own_shape(self) -> tuple[int, ...]:
        """Shape of the shard, of one expert's where it is several."""
        return self.shape[1:] if self.stacked else self.shape


@dataclass(frozen=True)
class Local:
    """A task of this rank with its parameter and the name that it has in its chunk."""

    task: Task
    name: str
    parameter: nn.Parameter
    transform: Transform
    index: int | slice | None
    """Which of the experts that the parameter holds; None where it is the whole parameter."""

    def of(self, values: Tensor) -> Tensor:
        """Its part of the parameter's values, or of other values by the same places."""
        return values if self.index is None else values[self.index]

    def to_megatron(self, weights: Mapping[str, Tensor], config: Qwen3VLConfig) -> Tensor:
        """The whole parameter, of all tensor-parallel ranks."""
        return self.transform.to_megatron([self._part(weights, n) for n in self.task.hf], config)

    def _part(self, weights: Mapping[str, Tensor], name: str) -> Tensor:
        if self.task.expert < 0:
            return weights[name]
        if isinstance(weights, Weights):
            return weights.expert(name, self.task.expert)
        return weights[name][self.task.expert]


def local_tasks(model: Qwen3VLModel, *, stack: int | None = None) -> Iterator[Local]:
    """Every parameter that this rank holds; one of experts as a task for each of them, or for each
    `stack` of them."""
    for chunk in model.chunks:
        yield from _chunk_tasks(chunk, stack)


def _chunk_tasks(model: Qwen3VLChunk, stack: int | None) -> Iterator[Local]:
    parallel = model.parallel
    for name, parameter in model.named_parameters():
        match, rule = _match(name)
        layer = int(match.groupdict().get("L", -1))
        if name.startswith("language_model.") and layer >= 0:
            layer = model.language_model.layers[layer]
        if rule.experts:
            group = parallel.groups.expt_tp
        elif name.startswith("vision_model."):
            group = model.vision_model.tp_group
        else:
            group = parallel.groups.tp
        is_split = rule.transform.dim is not None
        for index in _indices(len(parameter), stack) if rule.experts else [None]:
            own = parameter if index is None else parameter[index]
            first = index.start if isinstance(index, slice) else index
            task = Task(
                hf=tuple(hf.replace("{L}", str(layer)) for hf in rule.hf),
                expert=-1 if first is None else parallel.groups.ep.rank() * len(parameter) + first,
                part=group.rank() if is_split else 0,
                parts=group.size() if is_split else 1,
                shape=tuple(own.shape),
                dtype=str(parameter.dtype).removeprefix("torch."),
            )
            yield Local(task, name, parameter, rule.transform, index)


def _indices(experts: int, stack: int | None) -> list[int] | list[slice]:
    if stack is None:
        return list(range(experts))
    return [slice(first, first + stack) for first in range(0, experts, stack)]


def _match(name: str) -> tuple[re.Match[str], Rule]:
    for pattern, rule in _PATTERNS:
        if match := pattern.match(name):
            return match, rule
    raise AssertionError(f"no rule maps the Megatron parameter {name}; add one to RULES")


def all_tasks(model: Qwen3VLModel, local: list[Local]) -> dict[Task, list[int]]:
    """Every task of the model and the ranks that hold it, in the same order on every rank."""
    mine = [entry.task for entry in local]
    gathered: list[list[Task]] = [mine] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    holders: dict[Task, list[int]] = {}
    for rank, tasks in enumerate(gathered):
        for task in tasks:
            holders.setdefault(task, []).append(rank)
    return dict(sorted(holders.items()))


def load_hf_weights(model: Qwen3VLModel, tensors: Mapping[str, Tensor], source: str) -> None:
    """Fill the model's parameters from full Hugging Face tensors; each rank reads what it holds.

    tensors: name -> tensor, read lazily; fused experts as [experts, 2 * ffn, hidden] and
    [experts, hidden, ffn] (checkpoint_tools.hf_directory turns older layouts).

    Raises:
        ValueError: a name is missing or surplus, or a shape differs; before anything is written.
    """
    local = list(local_tasks(model))
    wanted = {name for task in all_tasks(model, local) for name in task.hf}
    check_names(model, wanted, set(tensors), source)
    shapes = _Shapes(tensors)
    for entry in local:
        _check_shape(entry, model, shapes, source)
    for entry in local:
        fp8_weights.assign(entry.of(entry.parameter), _shard(entry, model, tensors))


def check_names(model: Qwen3VLModel, wanted: set[str], given: set[str], source: str) -> None:
    """ValueError if `source` gives other names than the model wants."""
    if any(name.endswith("_scale_inv") for name in given):
        raise ValueError(
            f"{source} holds weights in FP8, with scales beside them; give the BF16 release, from "
            "which rollout.quantization and `checkpoint quantize` make FP8"
        )
    found = given - unused_names(model.architecture, model.head)
    if wanted != found:
        raise ValueError(
            f"{source} does not fit the model: {_listing('missing', wanted - found)}"
            f"{_listing('surplus', found - wanted)}Check that the checkpoint is of this "
            "architecture and complete."
        )


def unused_names(config: Qwen3VLConfig, head: Head) -> set[str]:
    """Tensors that a checkpoint may carry and its model does not use: the language head of a model
    that ties it or that scores instead."""
    return {"lm_head.weight"} if head == "score" or config.tie_word_embeddings else set()


def _listing(what: str, names: set[str], most: int = 5) -> str:
    if not names:
        return ""
    shown = ", ".join(sorted(names)[:most])
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{len(names)} {what} ({shown}{more}). "


class _Shapes(Weights):
    """The same names with meta tensors, to try a translation without reading anything."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self._weights = weights

    def like(self, name: str) -> Tensor:
        weights = self._weights
        return weights.like(name) if isinstance(weights, Weights) else weights[name].to("meta")

    def expert(self, name: str, index: int) -> Tensor:
        return self.like(name)[index]

    def __getitem__(self, name: str) -> Tensor:
        return self.like(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def _check_shape(entry: Local, model: Qwen3VLModel, shapes: _Shapes, source: str) -> None:
    found = [tuple(shapes.like(name).shape) for name in entry.task.hf]
    try:
        shard = _shard(entry, model, shapes)
    except RuntimeError as error:
        raise ValueError(
            f"{source}: {entry.task.hf} {found} can't be converted: {error}"
        ) from error
    if tuple(shard.shape) != entry.task.shape:
        raise ValueError(
            f"{source}: {', '.join(entry.task.hf)} with shape {found} gives a shard of "
            f"{tuple(shard.shape)}, the model wants {entry.task.shape}; config.json "
            "and weights are of different models"
        )


def _shard(entry: Local, model: Qwen3VLModel, tensors: Mapping[str, Tensor]) -> Tensor:
    """This rank's part of the parameter, from whole tensors."""
    full = entry.to_megatron(tensors, model.architecture)
    return entry.transform.shards(full, entry.task.parts)[entry.task.part]


_HF_PATTERNS = [(_pattern(rule.hf[0]), rule.transform) for rule in RULES]


@cache
def transform_to(name: str) -> Transform:
    """How the tensors translate of which `name` is the first Hugging Face name."""
    return next(transform for pattern, transform in _HF_PATTERNS if pattern.match(name))
