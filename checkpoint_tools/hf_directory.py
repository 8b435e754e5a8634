"""Hugging Face directories, read a tensor at a time."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoint_tools.files import forget
from checkpoint_tools.headers import DTYPES, QUANTISED, open_shard, read_places
from checkpoint_tools.weights import EXPERTS, StoredWeights
from model_providers.architecture import Qwen3VLConfig

TRL_HEAD = "v_head.summary.weight"


def _torch(dtypes: Mapping[str, str]) -> dict[str, torch.dtype]:
    return {stored: getattr(torch, name) for stored, name in dtypes.items()}


class SafetensorsDirectory(StoredWeights):
    """The tensors of a directory's shards by name, as they are stored."""

    dtypes: Mapping[str, torch.dtype] = _torch(DTYPES | QUANTISED)

    def __init__(self, path: Path, shards: Sequence[Path] | None = None) -> None:
        """shards: these alone, of a directory that is not finished.

        Raises ValueError naming the file if an index or a shard is missing or unreadable.
        """
        self.path = path
        self._places = read_places(path, shards)

    def __getitem__(self, name: str) -> Tensor:
        with open_shard(self.file_of(name), "pt") as tensors:
            tensor: Tensor = tensors.get_tensor(name)
        return tensor

    def expert(self, name: str, index: int) -> Tensor:
        with open_shard(self.file_of(name), "pt") as tensors:
            tensor: Tensor = tensors.get_slice(name)[index]
        return tensor

    def like(self, name: str) -> Tensor:
        place = self._places[name]
        dtype = self.dtypes.get(place.dtype)
        if dtype is None:
            raise ValueError(
                f"{place.file}: {name} is {place.dtype}; weights in "
                f"{', '.join(self.dtypes)} can be read. Quantised checkpoints have to be restored "
                "first"
            )
        return torch.empty(place.shape, dtype=dtype, device="meta")

    def file_of(self, name: str) -> Path:
        """The file that holds the tensor."""
        return self._places[name].file

    def forget(self, name: str) -> None:
        place = self._places[name]
        forget(place.file, place.start, place.length)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


class HFDirectory(SafetensorsDirectory):
    """The weights of a Hugging Face model, read when asked for.

    Fused expert tensors come as [experts, 2 * ffn, hidden] and [experts, hidden, ffn], whichever
    layout the file has: transformers 4.57 and the released checkpoints store the transpose.
    """

    dtypes: Mapping[str, torch.dtype] = _torch(DTYPES)

    def __init__(
        self, path: Path, value_head: Path | None = None, shards: Sequence[Path] | None = None
    ) -> None:
        """value_head: the reference's value_head.pt, read too; only on request, since the same
        weights usually are in the shards.
        shards: these alone, of a directory that is not finished.

        Raises ValueError naming the file if an index or a shard is missing or unreadable.
        """
        self.config = Qwen3VLConfig.from_hf(path)
        self.raw_config: dict[str, Any] = json.loads((path / "config.json").read_text())
        super().__init__(path, shards)
        self._head = _value_head(value_head) if value_head else {}
        self._head_file = value_head or path
        if found := sorted(set(self._head) & set(self._places)):
            raise ValueError(f"{found[0]} is in {value_head} and in {path}; leave the former out")

    def __getitem__(self, name: str) -> Tensor:
        if name in self._head:
            return self._head[name]
        tensor = super().__getitem__(name)
        return tensor.transpose(1, 2) if self._is_transposed(name, tensor.shape) else tensor

    def expert(self, name: str, index: int) -> Tensor:
        shape = self._places[name].shape
        tensor = super().expert(name, index)
        # turned as a whole, three times as fast as half by half
        return tensor.T.contiguous() if self._is_transposed(name, shape) else tensor

    def like(self, name: str) -> Tensor:
        if name in self._head:
            return self._head[name].to("meta")
        tensor = super().like(name)
        return tensor.transpose(1, 2) if self._is_transposed(name, tensor.shape) else tensor

    def file_of(self, name: str) -> Path:
        return self._head_file if name in self._head else super().file_of(name)

    def forget(self, name: str) -> None:
        if name not in self._head:
            super().forget(name)

    def __iter__(self) -> Iterator[str]:
        return iter([*self._places, *self._head])

    def __len__(self) -> int:
        return len(self._places) + len(self._head)

    def _is_transposed(self, name: str, shape: Sequence[int]) -> bool:
        """Whether these are experts in the layout of transformers 4.57. The writer
        (transformers_version) decides and the shape has to agree."""
        if not name.endswith(EXPERTS):
            return False
        c, file, shape = self.config, self.file_of(name), tuple(shape)
        inner = 2 * c.moe_intermediate_size if "gate_up" in name else c.moe_intermediate_size
        rows, columns = (inner, c.hidden_size) if "gate_up" in name else (c.hidden_size, inner)
        version = str(self.raw_config.get("transformers_version", ""))
        shapes = {
            "5": (c.num_experts, rows, columns),
            "4": (c.num_experts, columns, rows),
        }
        fits = [major for major, expected in shapes.items() if shape == expected]
        if not fits:
            raise ValueError(f"{file}: {name} has shape {shape}, wanted one of {shapes}")
        if len(fits) == 2:
            if version[:1] not in shapes:
                raise ValueError(
                    f"{file}: {name} is square, so its layout can't be seen; config.json has no "
                    "transformers_version that says who wrote it"
                )
            fits = [version[0]]
        return fits[0] == "4"


def _value_head(file: Path) -> dict[str, Tensor]:
    """The head under its name in shards, from the file that the reference writes beside them
    (moe/value_head.py, save_pretrained) under TRL's name. No code of the file is run."""
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{file} is no value_head.pt of plain tensors: {error}") from error
    if not isinstance(found, dict) or set(found) != {TRL_HEAD}:
        names = sorted(found) if isinstance(found, dict) else type(found).__name__
        raise ValueError(f"{file} holds {names}, wanted {TRL_HEAD} alone")
    return {"v_head.1.weight": found[TRL_HEAD]}
