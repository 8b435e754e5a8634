"""Export a Megatron checkpoint, from a conversion or from training, to Hugging Face format.

    prism-megatron checkpoint megatron-to-hf --ckpt runs/sft/checkpoints/step_000400/model --out hf

A shard passes through memory at a time; under torchrun the ranks share the shards. Each is read
back and compared with the checkpoint bit by bit as soon as it is written, and a run that was killed
goes on after those that it had finished and compared. Training may go on meanwhile.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from checkpoint_tools import hf_writer, world
from checkpoint_tools.command import exit_status
from checkpoint_tools.files import identity, new_folder
from checkpoint_tools.headers import hf_directory
from checkpoint_tools.hf_writer import TransformersLayout
from checkpoint_tools.megatron_weights import MegatronWeights


def export(ckpt: Path, out: Path, layout: TransformersLayout = "4.57", verify: bool = True) -> None:
    """Write `out` from `ckpt`; all ranks of the world call this.

    Raises:
        FileNotFoundError: `ckpt` is no complete checkpoint.
        ValueError: weights and config disagree, or a weight is not finite.
    """
    source = hf_directory(ckpt)
    if source == ckpt:
        raise ValueError(f"{ckpt} is a Hugging Face directory already")
    weights = MegatronWeights(ckpt)
    hf_writer.export(out, weights, source, {"from": identity(ckpt)}, layout, verify)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the top of the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ckpt", type=Path, required=True, help="Megatron checkpoint")
    parser.add_argument("--out", type=new_folder, required=True, help="directory to write")
    hf_writer.add_layout(parser)
    parser.add_argument("--no-verify", action="store_true", help="do not read the result back")
    options = parser.parse_args(argv)
    world.join()
    export(options.ckpt, options.out, options.transformers_layout, not options.no_verify)
    if dist.get_rank() == 0:
        print(f"{options.out}: written from {options.ckpt}")
    return 0


if __name__ == "__main__":
    raise SystemExit(exit_status(main))
