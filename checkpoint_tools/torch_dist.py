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
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter
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
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.checkpoint.utils import _create_file_view

from checkpoint_tools.chunks import Chunks
from checkpoint_tools.files import WriteBehind, forget, publish, write_atomically
from checkpoint_tools.headers import place_of, read_metadata

COMMON = "common_state/shard_0_1"
"""Where megatron.core keeps what is no tensor of the model or the optimizer."""


def packed(value: Any) -> bytes:
    """An object as the format stores it."""
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


class TorchDistReader:
    """The tensors and objects of a folder by key."""

    def __init__(self, path: Path, metadata: Metadata | None = None) -> None:
        """metadata: of a folder that has none yet.

        Raises ValueError if the folder's metadata is missing or unreadable.
        """
        self.path = path
        metadata = metadata or _metadata([read_metadata(path)])
        self._chunks: dict[MetadataIndex, _StorageInfo] = metadata.storage_data
        found = metadata.state_dict_metadata
        self.tensors = {k: v for k, v in found.items() if isinstance(v, TensorStorageMetadata)}
        self.objects = {k for k, v in found.items() if isinstance(v, BytesStorageMetadata)}
        self._chunks_of: dict[str, Chunks] = {}
        self.bytes = sum(info.length for info in metadata.storage_data.values())

    def file_of(self, key: str) -> Path:
        """The first file that holds part of `key`."""
        found = next(info for index, info in self._chunks.items() if index.fqn == key)
        return self.path / found.relative_path

    def read(self, key: str, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
        """A box of tensor `key`, however it is cut into chunks.

        Raises ValueError naming the file if the box is not covered or the file can't be read.
        """
        items = self.items(key, offsets, sizes)
        if len(items) == 1:
            return self._part_of_chunk(items[0])
        target = torch.empty(tuple(sizes), dtype=self.tensors[key].properties.dtype)
        for item in items:
            _box(target, item.dest_offsets, item.lengths).copy_(self._part_of_chunk(item))
        return target

    def _part_of_chunk(self, item: ReadItem) -> Tensor:
        info = self._chunks[item.storage_index]
        file = self.path / info.relative_path
        try:
            with file.open("rb") as stream:
                view = _create_file_view(stream, info.offset, info.length)
                chunk = torch.load(view, map_location="cpu", weights_only=True)
            return _box(chunk, item.storage_offsets, item.lengths)
        except FileNotFoundError:
            raise ValueError(
                f"{file} with {item.storage_index.fqn} is missing or was removed; training keeps "
                "its last train.keep_checkpoints and the best, take one that stays"
            ) from None
        except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
            raise ValueError(
                f"{file} with {item.storage_index.fqn} is missing, truncated or corrupt: {error}"
            ) from error

    def items(self, key: str, offsets: Sequence[int], sizes: Sequence[int]) -> list[ReadItem]:
        """What has to be read for a box; ValueError if not all of it is stored."""
        if key not in self._chunks_of:
            self._chunks_of[key] = Chunks(self.tensors[key])
        box = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        items = self._chunks_of[key].read_items(key, [box])
        covered = sum(math.prod(item.lengths) for item in items)
        if covered != math.prod(sizes):
            raise ValueError(
                f"{self.path}: {covered} of {math.prod(sizes)} elements of {key} are stored; the "
                "checkpoint is incomplete"
            )
        return items

    def forget(self, key: str, offsets: Sequence[int], sizes: Sequence[int]) -> None:
        """Take the chunks of a box out of the page cache."""
        for item in self.items(key, offsets, sizes):
            info = self._chunks[item.storage_index]
            forget(self.path / info.relative_path, info.offset, info.length)

    def object_bytes(self, key: str) -> bytes:
        """An object as it is stored."""
        info = next(info for index, info in self._chunks.items() if index.fqn == key)
        with self.file_of(key).open("rb") as file:
            file.seek(info.offset)
            return file.read(info.length)


def _box(tensor: Tensor, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
    for dim, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
        tensor = tensor.narrow(dim, offset, size)
    return tensor


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
    complete, on the disk and checked, so whoever goes on after a kill skips it, and several
    processes can share the parts.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files = FileSystemWriter(path, thread_count=1, sync_files=False)
        self._records = path / "parts"
        self._behind = WriteBehind()

    def has(self, part: int) -> bool:
        return self._record(part).exists()

    def write(
        self,
        part: int,
        pieces: Sequence[Piece],
        objects: dict[str, bytes] | None = None,
        check: Callable[[TorchDistReader], object] = lambda written: None,
    ) -> None:
        """Write one file, whose record follows at the next `write` or at `wait`; pieces are loaded
        one at a time, objects are as `packed` makes them.

        check: looks at what was written, while it is in memory; nothing is recorded if it raises.

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
                    **place_of(stored[piece.index]),
                }
                for piece in pieces
            ],
            "objects": [
                {"key": key, **place_of(stored[MetadataIndex(key)])} for key in objects or {}
            ],
        }
        file = self.path / f"__{part}_0.distcp"

        def commit() -> None:
            forget(file)
            write_atomically(self._record(part), json.dumps(record))

        self._behind.add(
            file, lambda: check(TorchDistReader(self.path, _metadata([record]))), commit
        )

    def wait(self) -> None:
        """Wait until everything that this process wrote has its record."""
        self._behind.wait()

    def finish(self, parts: int) -> None:
        """Make one folder of all parts; one process calls this when every part has a record. The
        records stay until `publish`, so that a kill up to then loses nothing."""
        metadata = _metadata(json.loads(self._record(part).read_text()) for part in range(parts))
        stored = metadata.storage_data
        results = [WriteResult(index, info.length, info) for index, info in stored.items()]
        try:
            self._files.finish(metadata, [results])
            save_config(CheckpointingConfig("torch_dist", 1), str(self.path))
        except OSError as error:
            raise ValueError(f"{self.path}/.metadata could not be written: {error}") from error

    def publish(self, out: Path) -> None:
        """Give the finished folder its final name."""
        publish(self.path, out)
        shutil.rmtree(out / self._records.name)

    def _record(self, part: int) -> Path:
        return self._records / f"{part}.json"


def _metadata(records: Iterable[dict[str, Any]]) -> Metadata:
    """Of a folder with the parts that have these records."""
    metadata = Metadata({}, storage_data={})
    for record in records:
        for entry in record["tensors"]:
            index = _add_chunk(metadata, entry)
            metadata.storage_data[index] = _info(entry)
        for entry in record["objects"]:
            metadata.state_dict_metadata[entry["key"]] = BytesStorageMetadata()
            metadata.storage_data[MetadataIndex(entry["key"])] = _info(entry)
    return metadata


def _info(entry: dict[str, Any]) -> _StorageInfo:
    return _StorageInfo(entry["file"], entry["start"], entry["length"])


def _add_chunk(metadata: Metadata, entry: dict[str, Any]) -> MetadataIndex:
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
    return MetadataIndex(key, offsets, len(stored.chunks) - 1)


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
