"""Cut a Megatron checkpoint, with its optimizer state, the way another layout reads it.

    prism-megatron checkpoint reshard --ckpt runs/sft/checkpoints/step_000400/model --out tp8 \\
        --tensor 8

Every checkpoint loads at any layout; a rank whose shard lies across several pieces reads them all
and keeps a part of each. Here every tensor is cut as the ranks of the given layout hold it, a file
a layer, so that each reads its own bytes and no others. Data, context and expert parallelism do not
cut tensors, and pipeline stages take whole layers, so only the two tensor-parallel sizes are asked
for, and whether the vision tower is split, too. Pieces pass through memory one at a time; under
torchrun the ranks share the layers, and a run that was killed goes on after those it had finished.
What was written is compared with the source bit by bit as soon as it is written.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from rich.progress import track
from torch import Tensor

from checkpoint_tools import world
from checkpoint_tools.command import exit_status
from checkpoint_tools.files import identity, new_folder, prepare_staging, staging_of
from checkpoint_tools.headers import OPTIMIZER, hf_directory
from checkpoint_tools.hf_writer import copy_config
from checkpoint_tools.megatron_weights import Entry, MegatronWeights, box
from checkpoint_tools.torch_dist import Piece, TorchDistReader, TorchDistWriter
from checkpoint_tools.weights import unequal
from model_providers import checks
from model_providers.architecture import Qwen3VLConfig
from model_providers.parallel import Layout
from model_providers.qwen3_vl import padded_vocab_size
from model_providers.weight_map import Split


def reshard(ckpt: Path, out: Path, layout: Layout) -> None:
    """Write `out`, the checkpoint `ckpt` cut for `layout`; all ranks of the world call this.

    Raises:
        FileNotFoundError: `ckpt` is no complete Megatron checkpoint.
        ValueError: the model can't be split so, the disk is full, or a copy differs.
    """
    if hf_directory(ckpt) == ckpt:
        raise ValueError(f"{ckpt} is a Hugging Face directory; hf-to-megatron makes a checkpoint")
    checks.check_layout(Qwen3VLConfig.from_hf(ckpt / "hf"), layout)
    source = MegatronWeights(ckpt)
    reader, layers = source.reader, source.structure.layers()
    plans = [[piece for e in layer for piece in _pieces(e, reader, layout)] for layer in layers]
    _check_complete(reader, plans)
    rank, size = world.rank_and_size()
    staging = staging_of(out)
    cut = [layout.tensor, layout.expert_tensor, layout.vision_tensor]
    job = {"from": identity(ckpt), "cut": cut}
    world.first(lambda: prepare_staging(out, job, reader.bytes))
    writer = TorchDistWriter(staging)
    mine = range(rank, len(layers), size)
    for i in track(mine, f"{out.name}: layers", disable=rank > 0, transient=True):
        if not writer.has(i):
            writer.write(i, plans[i], check=partial(_compare, plans[i], out))
    writer.wait()
    world.barrier()

    def finish() -> None:
        if not writer.has(len(layers)):
            objects = {key: reader.object_bytes(key) for key in sorted(reader.objects)}
            writer.write(len(layers), [], objects)
            writer.wait()
        writer.finish(len(layers) + 1)
        copy_config(ckpt / "hf", staging / "hf")
        writer.publish(out)

    world.first(finish)


def _pieces(entry: Entry, reader: TorchDistReader, layout: Layout) -> Iterator[Piece]:
    """A parameter's pieces at the layout, and those of its optimizer state."""
    parts = layout.expert_tensor if entry.expert >= 0 else layout.tensor
    if entry.local.name.startswith("vision_model."):
        parts = layout.vision_tensor
    for place in entry.places:
        for key in reader.tensors:
            if key == place.key or (key.startswith(OPTIMIZER) and key.endswith(f".{place.key}")):
                yield from _cut(key, place, entry.local.transform, parts, reader, layout)


def _cut(
    key: str,
    place: ShardedTensor,
    transform: object,
    parts: int,
    reader: TorchDistReader,
    layout: Layout,
) -> Iterator[Piece]:
    """`key` holds at `place` what a layer's tensor, or one half of gate and up, is made of."""
    stored = reader.tensors[key]
    shape, sizes, offsets = list(place.global_shape), list(box(place)), list(place.global_offset)
    if not isinstance(transform, Split):
        dim, parts = 0, 1
    else:
        dim = place.prepend_axis_num + transform.dim
    if place.allow_shape_mismatch:
        # a vocabulary, whose padding depends on the layout
        shape[dim] = sizes[dim] = padded_vocab_size(shape[dim], layout.tensor)
    step = sizes[dim] // parts
    assert step * parts == sizes[dim], (key, sizes, parts)
    for i in range(parts):
        start = [*offsets[:dim], offsets[dim] + i * step, *offsets[dim + 1 :]]
        size = [*sizes[:dim], step, *sizes[dim + 1 :]]
        yield Piece(
            key,
            tuple(shape),
            tuple(start),
            tuple(size),
            stored.properties.dtype,
            partial(_read, reader, key, start, size, dim),
        )


def _read(
    reader: TorchDistReader, key: str, start: Sequence[int], size: Sequence[int], dim: int
) -> Tensor:
    """A box of the source; zeros where a vocabulary has no more rows."""
    stored = reader.tensors[key]
    rows = max(0, min(size[dim], stored.size[dim] - start[dim]))
    if rows == size[dim]:
        return reader.read(key, start, size)
    tensor = torch.zeros(tuple(size), dtype=stored.properties.dtype)
    if rows:
        part = reader.read(key, start, [*size[:dim], rows, *size[dim + 1 :]])
        tensor.narrow(dim, 0, rows).copy_(part)
    return tensor


def _check_complete(reader: TorchDistReader, plans: list[list[Piece]]) -> None:
    """ValueError if something of the source would be left behind."""
    if lost := sorted(set(reader.tensors) - {piece.key for plan in plans for piece in plan}):
        raise ValueError(
            f"{reader.path}: {len(lost)} tensors belong to no parameter: {lost[:5]}; the "
            "checkpoint is of another version"
        )


def _compare(pieces: list[Piece], out: Path, written: TorchDistReader) -> None:
    """ValueError naming the tensors of which a piece differs."""
    wrong = {
        piece.key
        for piece in pieces
        if unequal(written.read(piece.key, piece.offsets, piece.sizes), piece.load())
    }
    if wrong:
        shown = sorted(wrong)[:5]
        raise ValueError(f"{out}: {len(wrong)} tensors differ from their source: {shown}")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the top of the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ckpt", type=Path, required=True, help="Megatron checkpoint")
    parser.add_argument("--out", type=new_folder, required=True, help="checkpoint to write")
    parser.add_argument("--tensor", type=int, default=1, help="tensor-parallel size")
    parser.add_argument("--expert-tensor", type=int, default=1, help="that of the experts")
    visions = ("sharded", "replicated")
    parser.add_argument("--vision", choices=visions, default="sharded", help="the vision tower")
    options = parser.parse_args(argv)
    world.join()
    layout = Layout(
        tensor=options.tensor,
        expert_tensor=options.expert_tensor,
        sequence_parallel=True,
        vision=options.vision,
    )
    reshard(options.ckpt, options.out, layout)
    if dist.get_rank() == 0:
        print(f"{options.out}: {options.ckpt} cut for tensor={options.tensor}")
    return 0


if __name__ == "__main__":
    raise SystemExit(exit_status(main))
