"""Export a Megatron checkpoint, from a conversion or from training, to Hugging Face format.

python -m checkpoint_tools.megatron_to_hf --ckpt runs/sft/checkpoints/step_000400/model --out hf
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist
from megatron.core.dist_checkpointing import load_tensors_metadata

from checkpoint_tools import hf_directory, megatron_directory
from model_providers import backend as backends
from model_providers.backend import Backend
from model_providers.parallel import Layout, ParallelState
from model_providers.qwen3_vl import Head
from model_providers.weight_map import iter_hf_weights


def export(ckpt: Path, out: Path, backend: Backend) -> None:
    """Write `out` from `ckpt` in one process.

    Raises FileNotFoundError if `ckpt` is no complete checkpoint.
    """
    source = megatron_directory.hf_directory(ckpt)
    backend.init_process_group()
    parallel = ParallelState.create(Layout())
    backend.seed(0, parallel)
    model = megatron_directory.load_model(ckpt, parallel, backend, head_of(ckpt))
    hf_directory.write(out, iter_hf_weights(model), source, writer=dist.get_rank() == 0)


def head_of(ckpt: Path) -> Head:
    """Whether the checkpoint holds a language model or a discriminator."""
    names = load_tensors_metadata(str(ckpt))
    return "score" if any("score_head" in name for name in names) else "language"


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the top of the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ckpt", type=Path, required=True, help="Megatron checkpoint")
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument("--backend", default="cpu", choices=("cpu", "cuda"))
    options = parser.parse_args(argv)
    export(options.ckpt, options.out, backends.create(options.backend))
    print(f"{options.out}: written from {options.ckpt}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
