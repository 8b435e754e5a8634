"""Convert a Hugging Face Qwen3-VL directory to a Megatron torch_dist checkpoint.

    prism-megatron checkpoint hf-to-megatron --hf Qwen/Qwen3-VL-4B-Instruct --out ckpt/qwen3vl-4b
    torchrun --nproc-per-node 8 -m checkpoint_tools.hf_to_megatron \\
        --hf Qwen/Qwen3-VL-32B-Instruct --out ckpt/qwen3vl-32b

The result loads at any parallel layout. A layer passes through memory at a time; ranks share the
layers. Each is read back and compared with the source bit by bit as soon as it is written, and a
run that was killed goes on after those that it had finished and compared.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist
from rich.progress import track
from torch import Tensor

from checkpoint_tools import hub, world
from checkpoint_tools.command import exit_status
from checkpoint_tools.files import identity, new_folder, prepare_staging, staging_of
from checkpoint_tools.hf_directory import HFDirectory
from checkpoint_tools.hf_writer import check_finite, copy_config
from checkpoint_tools.megatron_weights import (
    Entry,
    TorchDistWeights,
    ignored_names,
    structure_of,
)
from checkpoint_tools.torch_dist import (
    COMMON,
    Piece,
    TorchDistReader,
    TorchDistWriter,
    packed,
)
from checkpoint_tools.weights import compare_headers, compare_tensors


def convert(hf: Path, out: Path, value_head: Path | None = None, verify: bool = True) -> None:
    """Write `out` from `hf` and check it; all ranks of the world call this.

    value_head: a value_head.pt, for a directory whose shards have no head.

    Raises:
        ValueError: weights and config disagree, a weight is not finite, the disk is full, or the
            written checkpoint differs from the source.
    """
    source = HFDirectory(hf, value_head)
    structure = structure_of(source)
    unused = ignored_names(source, hf)
    layers = structure.layers()
    rank, size = world.rank_and_size()
    sources = identity(hf, value_head) if value_head else identity(hf)
    job = {"from": sources, "head": str(value_head), "verify": verify}
    nbytes = sum(source.like(name).nbytes for name in structure.by_name)
    world.first(lambda: prepare_staging(out, job, nbytes))
    staging = staging_of(out)
    writer = TorchDistWriter(staging)
    mine = range(rank, len(layers), size)
    for i in track(mine, f"{out.name}: layers", disable=rank > 0, transient=True):
        if writer.has(i):
            continue
        names = list(dict.fromkeys(name for entry in layers[i] for name in entry.names))

        def check(written: TorchDistReader, names: Sequence[str] = names) -> None:
            if verify:
                found = compare_tensors(source, TorchDistWeights(written, structure), names)
                found.raise_if_different(str(hf), str(out))

        pieces = [piece for entry in layers[i] for piece in _pieces(entry, source)]
        writer.write(i, pieces, check=check)
        for name in names:
            source.forget(name)
    writer.wait()
    world.barrier()

    def finish() -> None:
        if not writer.has(len(layers)):
            writer.write(len(layers), [], {COMMON: packed([{}])})
            writer.wait()
        writer.finish(len(layers) + 1)
        copy_config(hf, staging / "hf")
        written = TorchDistWeights(TorchDistReader(staging), structure)
        written.check()
        compare_headers(source, written, unused).raise_if_different(str(hf), str(out))
        writer.publish(out)

    world.first(finish)


def _pieces(entry: Entry, source: HFDirectory) -> list[Piece]:
    """What of the source is written for one parameter, in the source's own type."""

    def load() -> Tensor:
        tensor = entry.local.to_megatron(source, source.config)
        check_finite(tensor, ", ".join(entry.names), source.file_of(entry.names[0]))
        return tensor

    return entry.pieces(load, source.like(entry.names[0]).dtype)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the top of the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hf", required=True, help="Hugging Face directory or hub id")
    parser.add_argument("--out", type=new_folder, required=True, help="checkpoint to write")
    parser.add_argument("--value-head", type=Path, help="value_head.pt, if no shard has the head")
    parser.add_argument("--no-verify", action="store_true", help="do not read the result back")
    options = parser.parse_args(argv)
    world.join()
    convert(hub.local(options.hf), options.out, options.value_head, not options.no_verify)
    if dist.get_rank() == 0:
        checked = "not read back" if options.no_verify else "read back bit-equal"
        print(f"{options.out}: written from {options.hf}, {checked}")
    return 0


if __name__ == "__main__":
    raise SystemExit(exit_status(main))
