"""What checkpoints of both formats say of themselves. Without torch, which takes seconds to import.

Hugging Face    DIR/config.json       DIR/*.safetensors, each with names, types and shapes first
Megatron        DIR/hf/config.json    DIR/.metadata, a pickle of torch's classes, in whose place
                                      here come plain values: a pickle could run any code
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
QUANTISED = {"F8_E4M3": "float8_e4m3fn", "U8": "uint8"}
"""Types as safetensors names them, to torch's names."""

OPTIMIZER = "optimizer."
"""How the keys of optimizer state begin in torch_dist folders."""


def hf_directory(path: Path) -> Path:
    """Where the config and processor of a Hugging Face or Megatron directory lie.

    Raises FileNotFoundError if `path` is neither.
    """
    if (path / "metadata.json").exists() and (path / "hf" / "config.json").exists():
        return path / "hf"
    if (path / "config.json").exists():
        return path
    raise FileNotFoundError(
        f"{path} is neither a Hugging Face directory (no config.json) nor a complete Megatron "
        "checkpoint (no metadata.json with hf/config.json)"
    )


@dataclass(frozen=True)
class Place:
    """Where a tensor lies and what it is, as the header of its shard says."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    """In bytes from the beginning of the file."""
    length: int


def read_places(path: Path, shards: Sequence[Path] | None = None) -> dict[str, Place]:
    """The tensors of a Hugging Face directory by name; shards: those of these alone.

    Raises ValueError naming the file if an index or a shard is missing or unreadable.
    """
    if shards is not None:
        return _read_shards(path, shards)
    index = path / INDEX
    if not index.exists():
        return _read_shards(path, [path / SINGLE])
    if (path / SINGLE).exists():
        raise ValueError(
            f"{path} has {SINGLE} and {INDEX}, of which readers take one or the other; remove the "
            "one that is not of this model"
        )
    listed = _read_listed(index)
    found = _read_shards(path, [path / file for file in sorted(set(listed.values()))])
    if wrong := sorted(set(listed) ^ set(found)):
        raise ValueError(f"{index} and its shards disagree on {len(wrong)} names: {wrong[:5]}")
    return found


def read_header(file: Path) -> dict[str, Place]:
    """The tensors of a shard by name; ValueError if it is truncated or no safetensors file."""
    with open_shard(file, "np"):
        # safetensors has checked it now, but does not tell where tensors lie
        pass
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
    found = {}
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            shape = tuple(entry["shape"])
            found[name] = Place(file, entry["dtype"], shape, 8 + size + start, end - start)
    return found


def open_shard(file: Path, framework: str) -> Any:
    """safetensors' reader of a file; ValueError if it is truncated or no safetensors file."""
    try:
        return safe_open(file, framework)
    except SafetensorError as error:
        raise ValueError(f"{file} is truncated or not a safetensors file: {error}") from error


def _read_shards(path: Path, files: Sequence[Path]) -> dict[str, Place]:
    found: dict[str, Place] = {}
    for file in files:
        if not file.exists():
            raise ValueError(f"{file} is missing; {_why_missing(path)}")
        for name, place in read_header(file).items():
            if name in found:
                raise ValueError(f"{name} is in {found[name].file} and in {file}")
            found[name] = place
    return found


def _read_listed(index: Path) -> dict[str, str]:
    """File of each tensor as the index says; ValueError if it is damaged, or names files that are
    not beside it."""
    try:
        listed: dict[str, str] = json.loads(index.read_text())["weight_map"]
        outside = sorted({file for file in listed.values() if Path(file).name != file})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is truncated or no index of shards: {error!r}") from error
    if outside:
        raise ValueError(f"{index} names {outside[:3]}; shards lie beside their index")
    return listed


def _why_missing(path: Path) -> str:
    if pickles := sorted(path.glob("pytorch_model*.bin")):
        return (
            f"{pickles[0].name} beside it is a pickle, which could run any code and is not read; "
            "save the model as safetensors"
        )
    return "the checkpoint is incomplete"


def read_metadata(path: Path) -> dict[str, list[dict[str, Any]]]:
    """The chunks of a torch_dist folder, as TorchDistWriter records its parts:

    tensors: each chunk's key, shape (of the whole tensor), offsets, sizes, dtype, and the file,
    start and length (bytes) of its place; objects: each one's key and place.

    Raises ValueError naming the file if it is missing, damaged, or names files that are not beside
    it.
    """
    file = path / ".metadata"
    try:
        with file.open("rb") as stream:
            record = _record(_Unpickler(stream).load())
    except FileNotFoundError:
        raise ValueError(f"{file} is missing; the checkpoint is incomplete") from None
    # whatever the instructions of a damaged pickle come to
    except Exception as error:
        raise ValueError(f"{file} is truncated or no torch_dist metadata: {error!r}") from error
    files = {entry["file"] for entries in record.values() for entry in entries}
    if outside := sorted(name for name in files if Path(name).name != name):
        raise ValueError(f"{file} names {outside[:3]}; its files lie beside it")
    return record


def leading_ones(sizes: Sequence[int]) -> int:
    """On how many leading axes a chunk has one entry: those on which layers and experts are
    stacked."""
    return next((axis for axis, size in enumerate(sizes) if size != 1), len(sizes))


def place_of(info: Any) -> dict[str, Any]:
    """File, start and length of what torch's _StorageInfo says."""
    return {"file": info.relative_path, "start": info.offset, "length": info.length}


class _Value:
    """In the place of an object of torch: its attributes."""

    def __init__(self, *args: Any) -> None:
        self.args = args


class _MetadataIndex(_Value):
    offset: tuple[int, ...] | None = None
    """Objects have none."""


class _TensorProperties(_Value):
    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype = state[0]


_CHECKPOINT = "torch.distributed.checkpoint"
_METADATA = (
    "BytesStorageMetadata",
    "ChunkStorageMetadata",
    "Metadata",
    "StorageMeta",
    "TensorStorageMetadata",
    "_MEM_FORMAT_ENCODING",
)
_VALUES: dict[tuple[str, str], type] = {
    **{(f"{_CHECKPOINT}.metadata", name): _Value for name in _METADATA},
    (f"{_CHECKPOINT}.metadata", "MetadataIndex"): _MetadataIndex,
    (f"{_CHECKPOINT}.metadata", "TensorProperties"): _TensorProperties,
    (f"{_CHECKPOINT}.filesystem", "_StorageInfo"): _Value,
    ("torch.serialization", "_get_layout"): str,
    ("torch", "Size"): tuple,
    # where the checkpoint was written, if a caller gave no string
    ("pathlib", "PosixPath"): _Value,
}
_DTYPES = {
    *(*DTYPES.values(), *QUANTISED.values(), "float8_e5m2", "float64"),
    *("bool", "int8", "int16", "int32", "int64"),
}


class _Unpickler(pickle.Unpickler):
    """What torch's metadata is made of and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _DTYPES:
            return name
        if (module, name) not in _VALUES:
            raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint's metadata")
        return _VALUES[module, name]


def _record(metadata: Any) -> dict[str, list[dict[str, Any]]]:
    """Raises whatever comes of values that torch would not have written."""
    stored_at = {(index.fqn, index.offset): info for index, info in metadata.storage_data.items()}
    tensors, objects = [], []
    for key, stored in metadata.state_dict_metadata.items():
        if not hasattr(stored, "chunks"):
            objects.append({"key": key, **place_of(stored_at[key, None])})
            continue
        if not stored.chunks:
            raise ValueError(f"{key} has no chunks")
        shape, dtype = stored.size, stored.properties.dtype
        for chunk in stored.chunks:
            tensors.append(
                {
                    "key": key,
                    "shape": shape,
                    "offsets": chunk.offsets,
                    "sizes": chunk.sizes,
                    "dtype": dtype,
                    **place_of(stored_at[key, chunk.offsets]),
                }
            )
    return {"tensors": tensors, "objects": objects}
