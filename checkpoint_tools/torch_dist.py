"""torch_dist folders (the format of megatron.core and torch.distributed.checkpoint), read and
written piece by piece, so that a model of any size passes through a process of fixed size.

    DIR/.metadata        which tensors there are, their chunks, and where in which file each lies
    DIR/__PART_0.distcp  chunks, one after the other
    DIR/metadata.json    the format's version; its presence says that the folder is complete

megatron.core itself saves and loads whole models in whole worlds; these are the same files. torch
does the input and output, what is ours is the plan: which chunk of which tensor, and when.
"""

from __future__ import annotations

import io
import json
import math
import pickle
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo, _StoragePrefix
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    BytesIOWriteData,
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult

from checkpoint_tools.files import publish, write_atomically

OPTIMIZER = "optimizer."
"""How the keys of optimizer state begin."""
COMMON = "common_state/shard_0_1"
"""Where megatron.core keeps what is no tensor of the model or the optimizer."""


def packed(value: Any) -> bytes:
    """An object as the format stores it."""
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


class TorchDistReader:
    """The tensors and objects of a folder by key."""

    def __init__(self, path: Path) -> None:
        """Raises ValueError if the folder's metadata is missing or unreadable."""
        self.path = path
        metadata = _read_metadata(path / ".metadata")
        self._files = FileSystemReader(path)
        self._files.set_up_storage_reader(metadata, is_coordinator=True)
        found = metadata.state_dict_metadata
        self.tensors = {k: v for k, v in found.items() if isinstance(v, TensorStorageMetadata)}
        self.objects = {k for k, v in found.items() if isinstance(v, BytesStorageMetadata)}
        self._by_row: dict[str, dict[int, list[ChunkStorageMetadata]]] = {}
        self.bytes = sum(info.length for info in metadata.storage_data.values())

    def file_of(self, key: str) -> Path:
        """The first file that holds part of `key`."""
        chunks = self._files.storage_data
        return self.path / next(chunks[i].relative_path for i in chunks if i.fqn == key)

    def read(self, key: str, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
        """A box of tensor `key`, however it is cut into chunks.

        Raises ValueError naming the file if the box is not covered or the file can't be read.
        """
        stored = self._near(key, offsets, sizes)
        box = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        items = create_read_items_for_chunk_list(key, stored, [box])
        covered = sum(math.prod(item.lengths) for item in items)
        if covered != math.prod(sizes):
            raise ValueError(
                f"{self.path}: {covered} of {math.prod(sizes)} elements of {key} are stored; the "
                "checkpoint is incomplete"
            )
        target = torch.empty(tuple(sizes), dtype=stored.properties.dtype)
        planner = _Into(lambda item: _box(target, item.dest_offsets, item.lengths))
        try:
            self._files.read_data(LoadPlan(items), planner).wait()
        except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
            chunks = self._files.storage_data
            files = sorted({chunks[item.storage_index].relative_path for item in items})
            raise ValueError(
                f"{self.path}: {', '.join(files)} with {key} is missing, truncated or corrupt: "
                f"{error}"
            ) from error
        return target

    def _near(
        self, key: str, offsets: Sequence[int], sizes: Sequence[int]
    ) -> TensorStorageMetadata:
        """The tensor with the chunks that may hold the box. All layers are one tensor, and looking
        at every layer's chunks for each of them would take time quadratic in depth."""
        stored = self.tensors[key]
        if not sizes or sizes[0] != 1:
            return stored
        if key not in self._by_row:
            rows: dict[int, list[ChunkStorageMetadata]] = {}
            for chunk in stored.chunks:
                for row in range(chunk.offsets[0], chunk.offsets[0] + chunk.sizes[0]):
                    rows.setdefault(row, []).append(chunk)
            self._by_row[key] = rows
        chunks = self._by_row[key].get(offsets[0], [])
        return TensorStorageMetadata(stored.properties, stored.size, chunks)

    def object_bytes(self, key: str) -> bytes:
        """An object as it is stored."""
        info = next(v for k, v in self._files.storage_data.items() if k.fqn == key)
        with (self.path / info.relative_path).open("rb") as file:
            file.seek(info.offset)
            return file.read(info.length)


def _box(tensor: Tensor, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
    for dim, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
        tensor = tensor.narrow(dim, offset, size)
    return tensor


class _Into(DefaultLoadPlanner):
    """Reads go to what `target` says."""

    def __init__(self, target: Callable[[ReadItem], Tensor]) -> None:
        super().__init__()
        self._target = target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        return self._target(read_item)

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None: ...


_METADATA = (
    "BytesStorageMetadata",
    "ChunkStorageMetadata",
    "Metadata",
    "MetadataIndex",
    "StorageMeta",
    "TensorProperties",
    "TensorStorageMetadata",
    "_MEM_FORMAT_ENCODING",
)
_PLAIN = {
    *(("torch.distributed.checkpoint.metadata", name) for name in _METADATA),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    # where the checkpoint was written, if a caller gave no string
    ("pathlib", "PosixPath"),
}


class _PlainUnpickler(pickle.Unpickler):
    """What torch's metadata is made of and nothing else: a pickle could run any code."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) in _PLAIN:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint's metadata")


def _read_metadata(file: Path) -> Metadata:
    try:
        with file.open("rb") as stream:
            metadata = _PlainUnpickler(stream).load()
    except FileNotFoundError:
        raise ValueError(f"{file} is missing; the checkpoint is incomplete") from None
    except (pickle.UnpicklingError, EOFError, AttributeError, ValueError) as error:
        raise ValueError(f"{file} is truncated or no torch_dist metadata: {error}") from error
    return cast(Metadata, metadata)


@dataclass(frozen=True)
class Piece:
    """A chunk that is to be written."""

    key: str
    shape: tuple[int, ...]
    """Of the whole tensor."""
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]

    @property
    def index(self) -> MetadataIndex:
        return MetadataIndex(self.key, torch.Size(self.offsets))


class TorchDistWriter:
    """Writes a folder part by part, each one a file and a record beside it. What has a record is
    complete, so whoever goes on after a kill skips it, and several processes can share the parts.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files = FileSystemWriter(path, single_file_per_rank=True, thread_count=1)
        self._records = path / "parts"

    def has(self, part: int) -> bool:
        return self._record(part).exists()

    def write(
        self, part: int, pieces: Sequence[Piece], objects: dict[str, bytes] | None = None
    ) -> None:
        """Write one file; pieces are loaded one at a time, objects are as `packed` makes them.

        Raises ValueError if the disk is full.
        """
        self._records.mkdir(parents=True, exist_ok=True)
        source = _From(pieces, objects or {})
        plan = SavePlan(source.items(), storage_data=_StoragePrefix(f"__{part}_"))
        try:
            results: list[WriteResult] = self._files.write_data(plan, source).wait()
        except OSError as error:
            raise ValueError(f"{self.path}: part {part} could not be written: {error}") from error
        stored = {result.index: result.storage_data for result in results}
        record = {
            "tensors": [
                {
                    "key": piece.key,
                    "shape": piece.shape,
                    "offsets": piece.offsets,
                    "sizes": piece.sizes,
                    "dtype": str(piece.dtype).removeprefix("torch."),
                    **_place(stored[piece.index]),
                }
                for piece in pieces
            ],
            "objects": [
                {"key": key, **_place(stored[MetadataIndex(key)])} for key in objects or {}
            ],
        }
        write_atomically(self._record(part), json.dumps(record))

    def finish(self, parts: int) -> None:
        """Make one folder of all parts; one process calls this when every part has a record. The
        records stay until `publish`, so that a kill up to then loses nothing."""
        metadata = Metadata({}, storage_data={})
        results: list[WriteResult] = []
        for part in range(parts):
            record = json.loads(self._record(part).read_text())
            for entry in record["tensors"]:
                results.append(_add_chunk(metadata, entry))
            for entry in record["objects"]:
                metadata.state_dict_metadata[entry["key"]] = BytesStorageMetadata()
                results.append(_result(MetadataIndex(entry["key"]), entry))
        self._files.finish(metadata, [results])
        save_config(CheckpointingConfig("torch_dist", 1), str(self.path))

    def publish(self, out: Path) -> None:
        """Give the finished folder its final name."""
        publish(self.path, out)
        shutil.rmtree(out / self._records.name)

    def _record(self, part: int) -> Path:
        return self._records / f"{part}.json"


def _place(info: _StorageInfo) -> dict[str, Any]:
    return {"file": info.relative_path, "start": info.offset, "length": info.length}


def _result(index: MetadataIndex, entry: dict[str, Any]) -> WriteResult:
    info = _StorageInfo(entry["file"], entry["start"], entry["length"])
    return WriteResult(index=index, size_in_bytes=info.length, storage_data=info)


def _add_chunk(metadata: Metadata, entry: dict[str, Any]) -> WriteResult:
    key, shape = entry["key"], torch.Size(entry["shape"])
    properties = TensorProperties(dtype=getattr(torch, entry["dtype"]))
    stored = metadata.state_dict_metadata.setdefault(
        key, TensorStorageMetadata(properties, shape, [])
    )
    assert isinstance(stored, TensorStorageMetadata), key
    if (stored.size, stored.properties.dtype) != (shape, properties.dtype):
        raise ValueError(
            f"{key} is {stored.size} in {stored.properties.dtype} and {shape} in "
            f"{properties.dtype}; the source mixes shapes or types in one kind of layer"
        )
    offsets = torch.Size(entry["offsets"])
    stored.chunks.append(ChunkStorageMetadata(offsets, torch.Size(entry["sizes"])))
    return _result(MetadataIndex(key, offsets, len(stored.chunks) - 1), entry)


class _From(DefaultSavePlanner):
    """Hands the writer one tensor after the other."""

    def __init__(self, pieces: Iterable[Piece], objects: dict[str, bytes]) -> None:
        super().__init__()
        self._pieces = {piece.index: piece for piece in pieces}
        self._objects = objects

    def items(self) -> list[WriteItem]:
        items = [
            WriteItem(index, WriteItemType.SHARD, tensor_data=_write_data(piece))
            for index, piece in self._pieces.items()
        ]
        for key in self._objects:
            data = BytesIOWriteData(0)
            items.append(WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO, bytes_io_data=data))
        return items

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            return io.BytesIO(self._objects[write_item.index.fqn])
        piece = self._pieces[write_item.index]
        tensor = piece.load()
        assert tuple(tensor.shape) == piece.sizes and tensor.dtype == piece.dtype, piece
        return tensor.contiguous()


def _write_data(piece: Piece) -> TensorWriteData:
    chunk = ChunkStorageMetadata(torch.Size(piece.offsets), torch.Size(piece.sizes))
    return TensorWriteData(chunk, TensorProperties(dtype=piece.dtype), torch.Size(piece.shape))
