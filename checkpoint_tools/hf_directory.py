"""Hugging Face directories: tensors read one at a time, written by shards, never half there."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from model_providers.config import Qwen3VLConfig

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_SHARD_BYTES = 5 * 2**30
TRL_HEAD = "v_head.summary.weight"


class HFDirectory(Mapping[str, Tensor]):
    """The weights of a Hugging Face directory by name, read when asked for.

    Fused expert tensors come as [experts, 2 * ffn, hidden] and [experts, hidden, ffn], whichever
    layout the file has: transformers 4.57 and the released checkpoints store the transpose.
    """

    def __init__(self, path: Path, value_head: Path | None = None) -> None:
        """value_head: the reference's value_head.pt, read too; only on request, since the same
        weights usually are in the shards.

        Raises ValueError naming the file if an index or a shard is missing or unreadable.
        """
        self.path = path
        self.config = Qwen3VLConfig.from_hf(path)
        self.raw_config: dict[str, Any] = json.loads((path / "config.json").read_text())
        self._file_of = self._read_index()
        self._head = _value_head(value_head) if value_head else {}
        if found := sorted(set(self._head) & set(self._file_of)):
            raise ValueError(f"{found[0]} is in {value_head} and in {path}; leave the former out")

    def __getitem__(self, name: str) -> Tensor:
        if name in self._head:
            return self._head[name]
        file = self._file_of[name]
        with _open(file) as tensors:
            tensor: Tensor = tensors.get_tensor(name)
        if name.endswith((".experts.gate_up_proj", ".experts.down_proj")):
            return self._expert_layout(name, tensor, file)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter([*self._file_of, *self._head])

    def __len__(self) -> int:
        return len(self._file_of) + len(self._head)

    def _read_index(self) -> dict[str, Path]:
        index = self.path / INDEX
        files = [self.path / SINGLE]
        listed: dict[str, str] | None = None
        if index.exists():
            listed = json.loads(index.read_text())["weight_map"]
            files = [self.path / file for file in sorted(set(listed.values()))]
        found: dict[str, Path] = {}
        for file in files:
            if not file.exists():
                raise ValueError(f"{file} is missing; the checkpoint is incomplete")
            with _open(file) as tensors:
                for name in tensors.keys():
                    if name in found:
                        raise ValueError(f"{name} is in {found[name]} and in {file}")
                    found[name] = file
        if listed is not None and set(listed) != set(found):
            wrong = sorted(set(listed) ^ set(found))
            raise ValueError(f"{index} and its shards disagree on {len(wrong)} names: {wrong[:5]}")
        return found

    def _expert_layout(self, name: str, tensor: Tensor, file: Path) -> Tensor:
        """The writer (transformers_version) decides the layout and the shape has to agree."""
        c = self.config
        inner = 2 * c.moe_intermediate_size if "gate_up" in name else c.moe_intermediate_size
        rows, columns = (inner, c.hidden_size) if "gate_up" in name else (c.hidden_size, inner)
        version = str(self.raw_config.get("transformers_version", ""))
        shapes = {
            "5": (c.num_experts, rows, columns),
            "4": (c.num_experts, columns, rows),
        }
        shape = tuple(tensor.shape)
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
        return tensor if fits[0] == "5" else tensor.transpose(1, 2)


def _open(file: Path) -> Any:
    try:
        return safe_open(file, "pt")
    except SafetensorError as error:
        raise ValueError(f"{file} is truncated or not a safetensors file: {error}") from error


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


def write(
    out: Path, tensors: Iterable[tuple[str, Tensor]], config_from: Path, writer: bool
) -> None:
    """Write a Hugging Face directory that appears under its name only when complete.

    config_from: directory whose config, processor and tokenizer files go with the weights.
    Every rank calls this, since producing tensors may need all of them; only the one with
    writer=True touches the disk. Expert tensors come in the layout of transformers 5.
    """
    staging = out.with_name(f".{out.name}.partial")
    if writer:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
    shards = _ShardWriter(staging) if writer else None
    for name, tensor in tensors:
        if shards is not None:
            shards.add(name, tensor)
    if shards is None:
        return
    shards.close()
    copy_config(config_from, staging)
    Qwen3VLConfig.from_hf(staging)
    shutil.rmtree(out, ignore_errors=True)
    os.replace(staging, out)


def copy_config(source: Path, target: Path) -> None:
    """Copy everything of a Hugging Face directory but weights: config, processor, tokenizer."""
    target.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.is_file() and file.suffix not in (".safetensors", ".pt") and file.name != INDEX:
            shutil.copyfile(file, target / file.name)


class _ShardWriter:
    """Collects tensors into safetensors shards of bounded size, then writes the index."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.pending: dict[str, Tensor] = {}
        self.shards: list[list[str]] = []
        self.total = 0

    def add(self, name: str, tensor: Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        held = sum(t.numel() * t.element_size() for t in self.pending.values())
        if self.pending and held + size > MAX_SHARD_BYTES:
            self._flush()
        self.pending[name] = tensor.detach().cpu().contiguous().clone()
        self.total += size

    def _flush(self) -> None:
        file = self.directory / f"shard-{len(self.shards)}.safetensors"
        save_file(self.pending, file, metadata={"format": "pt"})
        self.shards.append(list(self.pending))
        self.pending = {}

    def close(self) -> None:
        self._flush()
        count = len(self.shards)
        if count == 1:
            os.replace(self.directory / "shard-0.safetensors", self.directory / SINGLE)
            return
        weight_map = {}
        for i, names in enumerate(self.shards):
            final = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
            os.replace(self.directory / f"shard-{i}.safetensors", self.directory / final)
            weight_map |= dict.fromkeys(names, final)
        index = {"metadata": {"total_size": self.total}, "weight_map": weight_map}
        (self.directory / INDEX).write_text(json.dumps(index, indent=2))
