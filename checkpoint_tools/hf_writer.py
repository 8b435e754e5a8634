"""Hugging Face directories, written shard by shard and never half there.

    layout  configuration                      fused experts
    4.57    rope_theta and rope_scaling        [experts, hidden, 2 * ffn], [experts, ffn, hidden]
    5       rope_parameters                    [experts, 2 * ffn, hidden], [experts, hidden, ffn]

4.57 is how the released checkpoints are and what SGLang, vLLM and every transformers since read.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from rich.progress import track
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from checkpoint_tools.files import (
    JOB,
    LOCK,
    WriteBehind,
    check_room,
    forget,
    prepare_staging,
    publish,
    replace_folder,
    staging_of,
    sync,
    write_atomically,
)
from checkpoint_tools.headers import INDEX, SINGLE, read_header
from checkpoint_tools.hf_directory import HFDirectory, SafetensorsDirectory
from checkpoint_tools.weights import EXPERTS, StoredWeights, compare_headers, compare_tensors
from checkpoint_tools.world import barrier, first, rank_and_size
from model_providers.architecture import Qwen3VLConfig

TransformersLayout = Literal["4.57", "5"]
LAYOUTS: tuple[TransformersLayout, ...] = ("4.57", "5")
VERSIONS = {"4.57": "4.57.6", "5": "5.6.0"}
SHARD_BYTES = 2**30


def write(
    out: Path,
    tensors: Iterable[tuple[str, Tensor]],
    nbytes: int,
    config_from: Path,
    layout: TransformersLayout = "4.57",
) -> None:
    """Write what a model in training yields; `out` appears when complete, over an older one.

    nbytes: of all tensors. config_from: directory whose config, processor and tokenizer files go
    with the weights. Every rank calls this, since producing tensors may need all of them; only the
    first touches the disk. Expert tensors come in the layout of transformers 5.

    Raises:
        ValueError: on all ranks; no room, or a weight that is NaN or infinite.
    """
    produced = iter(tensors)

    def write_all() -> None:
        try:
            _write(out, produced, nbytes, config_from, layout)
        except (ValueError, OSError):
            _exhaust(produced)
            raise

    if rank_and_size()[0]:
        _exhaust(produced)
    first(write_all)


def _exhaust(produced: Iterator[object]) -> None:
    """Take part in making the rest, which other ranks do too."""
    for _ in produced:
        pass


def _write(
    out: Path,
    tensors: Iterator[tuple[str, Tensor]],
    nbytes: int,
    config_from: Path,
    layout: TransformersLayout,
) -> None:
    staging = staging_of(out)
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    check_room(out, nbytes)
    files: list[Path] = []
    pending: dict[str, Tensor] = {}
    held = 0

    def save() -> None:
        files.append(staging / f"shard-{len(files)}.safetensors")
        _save(files[-1], pending)
        sync(files[-1])
        pending.clear()

    for name, tensor in tensors:
        if pending and held + tensor.nbytes > SHARD_BYTES:
            save()
            held = 0
        check_finite(tensor, name, out)
        pending[name], held = _copied(name, tensor.detach(), layout), held + tensor.nbytes
    save()
    write_config(staging, config_from, layout)
    write_index(staging, files)
    replace_folder(staging, out)


def _copied(name: str, tensor: Tensor, layout: TransformersLayout) -> Tensor:
    """A tensor of a live model as the layout has it, in memory of its own."""
    if not name.endswith(EXPERTS):
        return tensor.cpu().clone()
    return _experts(name, tensor, tensor, layout)


def export(
    out: Path,
    weights: StoredWeights,
    config_from: Path,
    job: dict[str, Any],
    layout: TransformersLayout = "4.57",
    verify: bool = True,
    directory: type[SafetensorsDirectory] = HFDirectory,
    check: Callable[[Path], None] | None = None,
) -> None:
    """Write `weights` shard by shard, shared out among the ranks; each one is read back and
    compared bit by bit as soon as it is written. `out` appears when all is there. All ranks of the
    world call this.

    job: what this is made of; the shards that an equal job had finished when it was killed stay.
    directory: what reads them back.
    check: looks at the finished folder on all ranks before it appears.

    Raises:
        ValueError: no room, a weight that is NaN or infinite, or a difference.
    """
    shards = _plan(weights)
    nbytes = sum(weights.like(name).nbytes for name in weights)
    rank, size = rank_and_size()
    job = job | {"layout": layout, "shards": len(shards), "verify": verify}
    staging, behind = staging_of(out), WriteBehind()

    def prepare() -> None:
        prepare_staging(out, job, nbytes)
        write_config(staging, config_from, layout)

    first(prepare)
    files = [
        staging / f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))
    ]
    mine = range(rank, len(shards), size)
    for i in track(mine, f"{out.name}: shards", disable=rank > 0, transient=True):
        if files[i].exists():
            continue
        part = files[i].with_name(f".{files[i].name}")
        _save(part, {name: _stored(weights, name, layout) for name in shards[i]})

        def compare(part: Path = part, names: Sequence[str] = shards[i]) -> None:
            if verify:
                found = compare_tensors(weights, directory(staging, shards=[part]), names)
                found.raise_if_different("its source", str(out))

        def commit(part: Path = part, file: Path = files[i]) -> None:
            forget(part)
            os.replace(part, file)

        behind.add(part, compare, commit)
        for name in shards[i]:
            weights.forget(name)
    behind.wait()
    barrier()

    def finish() -> None:
        write_index(staging, files)
        found = compare_headers(weights, directory(staging))
        found.raise_if_different("its source", str(out))

    first(finish)
    if check is not None:
        check(staging)
    first(lambda: publish(staging, out))


def _stored(weights: StoredWeights, name: str, layout: TransformersLayout) -> Tensor:
    """A tensor as the layout has it, without NaN and infinities; experts one by one, so that all of
    a layer's are in memory once."""
    if not name.endswith(EXPERTS):
        tensor = weights[name]
        check_finite(tensor, name, weights.file_of(name))
        return tensor.contiguous()
    like = weights.like(name)

    def finite(index: int) -> Tensor:
        expert = weights.expert(name, index)
        check_finite(expert, f"{name}[{index}]", weights.file_of(name))
        return expert

    return _experts(name, like, map(finite, range(like.shape[0])), layout)


def _experts(
    name: str, like: Tensor, experts: Iterable[Tensor], layout: TransformersLayout
) -> Tensor:
    """[experts, rows, columns] as the layout has it, filled one by one."""
    count, rows, columns = like.shape
    if rows == columns:
        raise ValueError(
            f"{name} is square {tuple(like.shape)}: readers tell the two layouts of experts by "
            "their shape and would guess; choose another expert size"
        )
    turned = layout == "4.57"
    stored = torch.empty(
        (count, columns, rows) if turned else (count, rows, columns), dtype=like.dtype
    )
    for i, expert in enumerate(experts):
        stored[i].copy_(expert.T if turned else expert)
    return stored


def check_finite(tensor: Tensor, name: str, file: Path) -> None:
    """ValueError naming tensor and file if an element is NaN or infinite."""
    if tensor.element_size() == 1:
        tensor = tensor.float()
    # one pass without temporaries, 80 times as fast; a sum that overflows is looked at again
    if math.isfinite(float(tensor.sum())):
        return
    if not bool(torch.isfinite(tensor).all()):
        bad = int((~torch.isfinite(tensor)).sum())
        raise ValueError(
            f"{file}: {name} has {bad} of {tensor.numel()} elements that are NaN or infinite; the "
            "weights are spoilt, go back to an earlier checkpoint"
        )


def _plan(weights: StoredWeights) -> list[list[str]]:
    """Names of each shard, in order."""
    shards: list[list[str]] = [[]]
    held = 0
    for name in weights:
        size = weights.like(name).nbytes
        if shards[-1] and held + size > SHARD_BYTES:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += size
    return shards


def _save(file: Path, tensors: dict[str, Tensor]) -> None:
    try:
        save_file(tensors, file, {"format": "pt"})
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} could not be written: {error}") from error


def write_index(staging: Path, files: list[Path]) -> None:
    """Name the shards and write their index."""
    listed: dict[str, str] = {}
    total = 0
    for i, file in enumerate(files):
        final = SINGLE if len(files) == 1 else f"model-{i + 1:05d}-of-{len(files):05d}.safetensors"
        os.replace(file, staging / final)
        places = read_header(staging / final)
        listed |= dict.fromkeys(places, final)
        total += sum(place.length for place in places.values())
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": listed}
        write_atomically(staging / INDEX, json.dumps(index, indent=2))


def write_config(staging: Path, config_from: Path, layout: TransformersLayout) -> None:
    """Config, processor and tokenizer, as that transformers writes them."""
    copy_config(config_from, staging)
    config = staging / "config.json"
    raw = in_dialect(json.loads(config.read_text()), layout)
    write_atomically(config, json.dumps(raw, indent=2) + "\n")
    Qwen3VLConfig.from_hf(staging)


def copy_config(source: Path, target: Path) -> None:
    """Copy everything of a Hugging Face directory but weights: config, processor, tokenizer."""
    target.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        weights = file.suffix in (".safetensors", ".pt", ".bin")
        if file.is_file() and not weights and file.name not in (INDEX, JOB, LOCK):
            shutil.copyfile(file, target / file.name)


def in_dialect(raw: dict[str, Any], layout: TransformersLayout) -> dict[str, Any]:
    """config.json as that transformers writes it, from either; the keys tell which it is.

    The text part says of tied embeddings what the whole does, which decides in transformers: vLLM
    reads it there and would otherwise sample with a head of its own that no checkpoint has.
    """
    text = raw["text_config"] | {"tie_word_embeddings": raw.get("tie_word_embeddings", False)}
    if layout == "4.57" and "rope_parameters" in text:
        rope = dict(text.pop("rope_parameters"))
        text["rope_theta"] = rope.pop("rope_theta")
        text["rope_scaling"] = rope
        if "num_local_experts" in text:
            text["num_experts"] = text.pop("num_local_experts")
    elif layout == "5" and "rope_scaling" in text:
        rope = dict(text.pop("rope_scaling"))
        text["rope_parameters"] = rope | {"rope_theta": text.pop("rope_theta")}
    raw = raw | {"text_config": text}
    if str(raw.get("transformers_version")).startswith(layout.partition(".")[0]):
        return raw
    return raw | {"transformers_version": VERSIONS[layout]}


def add_layout(parser: argparse.ArgumentParser) -> None:
    """The option of every tool that writes a Hugging Face directory."""
    parser.add_argument(
        "--transformers-layout",
        default="4.57",
        choices=LAYOUTS,
        help="configuration and fused experts as this transformers writes them; 4.57 (default) is "
        "what the released checkpoints have and every engine reads",
    )
