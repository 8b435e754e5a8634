"""A torch_dist folder seen under Hugging Face names, and how each name lies in it.

The model is built on the meta device, without memory, and megatron.core says of every parameter
under which key, at which offset and in which pieces it is stored; the weight map says what it is
made of. Nothing here holds more than one parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from torch import Tensor

from checkpoint_tools.headers import OPTIMIZER
from checkpoint_tools.hf_directory import HFDirectory
from checkpoint_tools.torch_dist import Piece, TorchDistReader
from checkpoint_tools.weights import StoredWeights
from model_providers import backend as backends
from model_providers.architecture import Qwen3VLConfig
from model_providers.parallel import Layout, ParallelState
from model_providers.qwen3_vl import Head, Qwen3VLModel
from model_providers.weight_map import (
    GatedUp,
    Local,
    Weights,
    check_names,
    local_tasks,
    unused_names,
)


@dataclass(frozen=True)
class Entry:
    """One parameter, its Hugging Face names and its place in the folder."""

    local: Local
    stored: ShardedTensor | ShardedTensorFactory

    @property
    def names(self) -> tuple[str, ...]:
        return self.local.task.hf

    @property
    def expert(self) -> int:
        return self.local.task.expert

    @cached_property
    def places(self) -> list[ShardedTensor]:
        """Key, offset and shape of each piece, with meta tensors."""
        return _pieces(self.stored)

    def pieces(self, load: Callable[[], Tensor], dtype: torch.dtype) -> list[Piece]:
        """What to write; `load` gives the whole parameter and is called once."""
        loaded: list[Tensor] = []

        def piece(index: int) -> Tensor:
            if not loaded:
                loaded.extend(_split(self.stored, load()))
            tensor, last = loaded[index], index == len(self.places) - 1
            if last:
                loaded.clear()
            # turned as the matrix that it is, several times as fast as with axes before it
            return tensor.contiguous().reshape(box(self.places[index]))

        return [
            Piece(
                place.key,
                tuple(place.global_shape),
                tuple(place.global_offset),
                box(place),
                dtype,
                partial(piece, index),
            )
            for index, place in enumerate(self.places)
        ]

    def join(self, pieces: Sequence[Tensor]) -> Tensor:
        """The parameter from its pieces."""
        if isinstance(self.stored, ShardedTensorFactory):
            joined: Tensor = self.stored.merge_fn([*pieces])
            return joined
        return pieces[0]


def box(place: ShardedTensor) -> tuple[int, ...]:
    """Sizes of a piece, with the axes that layers and experts are stacked on."""
    return (1,) * place.prepend_axis_num + tuple(place.local_shape)


def _place(
    local: Local, stored: ShardedTensor | ShardedTensorFactory
) -> ShardedTensor | ShardedTensorFactory:
    """Where the parameter is stored, or that one of its experts that `local` is."""
    if local.index is None:
        return stored
    assert isinstance(stored, ShardedTensor), "the structure is one rank's"
    # layer and expert
    axes = stored.prepend_axis_num + 1
    places = [*stored.global_offset[: axes - 1], stored.global_offset[axes - 1] + local.index]
    offsets = tuple(zip(range(axes), places, stored.global_shape[:axes], strict=True))
    place = ShardedTensor.from_rank_offsets(
        stored.key, local.of(stored.data), *offsets, prepend_axis_num=axes
    )
    is_gated = isinstance(local.transform, GatedUp)
    return apply_swiglu_sharded_factory(place, offsets) if is_gated else place


def _pieces(stored: ShardedTensor | ShardedTensorFactory) -> list[ShardedTensor]:
    if isinstance(stored, ShardedTensor):
        return [stored]
    built: Any = stored.build()
    assert isinstance(built, list), f"{stored.key} is stored as {type(built).__name__}"
    return built


def _split(stored: ShardedTensor | ShardedTensorFactory, tensor: Tensor) -> list[Tensor]:
    if isinstance(stored, ShardedTensor):
        return [tensor]
    pieces = _pieces(replace(stored, data=tensor))
    return [piece.data for piece in pieces if piece.data is not None]


class Structure:
    """All parameters of a model, by Hugging Face name and in groups of one layer each."""

    def __init__(self, config: Qwen3VLConfig, head: Head) -> None:
        """Every rank of the world calls this."""
        backend = backends.create("cpu")
        backend.init_process_group()
        parallel = ParallelState.create(Layout())
        backend.seed(0, parallel)
        with torch.device("meta"):
            self.model = Qwen3VLModel(config, parallel, backend, head)
        self.config = config
        [chunk] = self.model.chunks
        stored = chunk.sharded_state_dict(metadata={"dp_cp_group": parallel.groups.dp_cp})
        self.entries = [
            Entry(local, _place(local, stored[local.name])) for local in local_tasks(self.model)
        ]
        self.by_name: dict[str, list[Entry]] = {}
        for entry in self.entries:
            for name in entry.names:
                self.by_name.setdefault(name, []).append(entry)

    def layers(self) -> list[list[Entry]]:
        """The entries in groups that are neither many nor large: a layer each, and what is outside
        of layers one by one."""
        groups: dict[str, list[Entry]] = {}
        for entry in self.entries:
            head, found, rest = entry.local.name.partition(".layers.")
            key = f"{head}.{rest.split('.')[0]}" if found else entry.local.name
            groups.setdefault(key, []).append(entry)
        return list(groups.values())

    def check(self, weights: Weights, source: str) -> None:
        """ValueError naming the tensor if names, shapes or types are not this model's."""
        check_names(self.model, set(self.by_name), set(weights), source)
        dtypes: dict[str, tuple[torch.dtype, str]] = {}
        for name, entries in self.by_name.items():
            found, wanted = weights.like(name), self.like(name)
            if found.shape != wanted.shape:
                raise ValueError(
                    f"{source}: {name} has shape {tuple(found.shape)}, its config.json wants "
                    f"{tuple(wanted.shape)}; config.json and weights are of different models"
                )
            for place in entries[0].places:
                dtype, first = dtypes.setdefault(place.key, (found.dtype, name))
                if dtype != found.dtype:
                    raise ValueError(
                        f"{source}: {name} is {found.dtype}, but {first} is {dtype}; layers of one "
                        "kind are stored as one tensor of one type"
                    )

    def like(self, name: str) -> Tensor:
        """Shape of the Hugging Face tensor, as a meta tensor."""
        entries = self.by_name[name]
        local = entries[0].local
        full = local.of(local.parameter.detach())
        tensor = local.transform.to_hf(full, self.config)[local.task.hf.index(name)]
        return tensor if local.task.expert < 0 else torch.stack([tensor] * len(entries))


def head_of(names: Weights | dict[str, Any]) -> Head:
    """Whether these are tensors of a language model or of a discriminator, in either naming."""
    return (
        "score"
        if any(n.startswith("v_head.") or ".score_head." in n for n in names)
        else ("language")
    )


def structure_of(weights: HFDirectory) -> Structure:
    """The model that a Hugging Face directory holds, all of it; every rank calls this.

    Raises:
        ValueError: config.json and weights disagree, or a discriminator's head would be left out.
    """
    path, head = weights.path, head_of(weights)
    if head == "language":
        if "prism_discriminator" in weights.raw_config:
            raise ValueError(f"{path} has no value head, but its config.json is a discriminator's")
        if (path / "value_head.pt").exists():
            raise ValueError(
                f"{path} has a value_head.pt, a pickle that is read on request only, and no head "
                "in its shards; hf-to-megatron --value-head reads it. Remove it if this is no "
                "discriminator"
            )
    structure = Structure(weights.config, head)
    structure.check(weights, str(path))
    return structure


def ignored_names(weights: HFDirectory | TorchDistWeights, path: Path) -> set[str]:
    """What one side may have alone: a language head that is tied, or that a discriminator has not.

    Raises ValueError if a tied head is not the embedding after all.
    """
    head, embedding = "lm_head.weight", "model.language_model.embed_tokens.weight"
    is_language, is_tied = head_of(weights) == "language", weights.config.tie_word_embeddings
    if is_tied and is_language and head in weights:
        if not torch.equal(weights[head], weights[embedding]):
            raise ValueError(
                f"{path}: config.json ties {head} to {embedding}, but they differ, so one of them "
                "would be lost; set tie_word_embeddings to false"
            )
    return unused_names(weights.config, head_of(weights))


class TorchDistWeights(StoredWeights):
    """The weights of a torch_dist folder, or of a part of one, under their Hugging Face names.

    Optimizer state and what layers keep for FP8 are no weights and left alone.
    """

    def __init__(self, reader: TorchDistReader, structure: Structure) -> None:
        self.reader, self.structure, self.config = reader, structure, structure.config
        self._last: tuple[Entry, list[Tensor]] | None = None

    def like(self, name: str) -> Tensor:
        key = self.structure.by_name[name][0].places[0].key
        dtype = self.reader.tensors[key].properties.dtype
        return self.structure.like(name).to(dtype)

    def expert(self, name: str, index: int) -> Tensor:
        return self._tensor(self.structure.by_name[name][index], name)

    def file_of(self, name: str) -> Path:
        return self.reader.file_of(self.structure.by_name[name][0].places[0].key)

    def forget(self, name: str) -> None:
        for entry in self.structure.by_name[name]:
            for place in entry.places:
                self.reader.forget(place.key, place.global_offset, self._sizes(place))

    def __getitem__(self, name: str) -> Tensor:
        entries = self.structure.by_name[name]
        tensors = [self._tensor(entry, name) for entry in entries]
        return tensors[0] if entries[0].expert < 0 else torch.stack(tensors)

    def __iter__(self) -> Iterator[str]:
        return iter(self.structure.by_name)

    def __len__(self) -> int:
        return len(self.structure.by_name)

    def _tensor(self, entry: Entry, name: str) -> Tensor:
        # q, k and v are one parameter and usually asked for one after the other
        if self._last is None or self._last[0] is not entry:
            self._last = None
            pieces = [
                self.reader.read(p.key, p.global_offset, self._sizes(p)).reshape(
                    self._sizes(p)[p.prepend_axis_num :]
                )
                for p in entry.places
            ]
            full = entry.join(pieces)
            self._last = (entry, entry.local.transform.to_hf(full, self.config))
        return self._last[1][entry.names.index(name)]

    def _sizes(self, place: ShardedTensor) -> tuple[int, ...]:
        """A vocabulary is stored with the padding of the layout that wrote it."""
        if place.allow_shape_mismatch:
            return tuple(self.reader.tensors[place.key].size)
        return box(place)

    def check(self) -> None:
        """ValueError if keys or shapes are not the structure's, or not all of one is stored."""
        path = self.reader.path
        places = [place for entry in self.structure.entries for place in entry.places]
        wanted = {place.key: place for place in places}
        found = {key for key in self.reader.tensors if not key.startswith(OPTIMIZER)}
        if missing := sorted(wanted.keys() - found):
            raise ValueError(f"{path} lacks {len(missing)} tensors: {missing[:5]}")
        if surplus := sorted(found - wanted.keys()):
            raise ValueError(
                f"{path} has {len(surplus)} tensors that its config.json knows nothing of: "
                f"{surplus[:5]}"
            )
        for key, place in wanted.items():
            shape = tuple(self.reader.tensors[key].size)
            if not place.allow_shape_mismatch and shape != tuple(place.global_shape):
                raise ValueError(
                    f"{path}: {key} has shape {shape}, its config.json wants "
                    f"{tuple(place.global_shape)}"
                )
        for place in places:
            self.reader.items(place.key, place.global_offset, self._sizes(place))


class MegatronWeights(TorchDistWeights):
    """The weights of a complete Megatron checkpoint under their Hugging Face names."""

    def __init__(self, path: Path) -> None:
        """Every rank of the world calls this.

        Raises:
            ValueError: config.json wants other tensors or shapes than the folder has.
        """
        reader, config = TorchDistReader(path), Qwen3VLConfig.from_hf(path / "hf")
        super().__init__(reader, Structure(config, head_of(reader.tensors)))
        self.check()
