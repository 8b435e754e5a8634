"""Convert a Hugging Face Qwen3-VL directory to a Megatron torch_dist checkpoint.

    python -m checkpoint_tools.hf_to_megatron --hf models/Qwen3-VL-4B-Instruct --out ckpt/qwen3vl-4b

The result loads at any parallel layout. Under torchrun the ranks share the work as
--tensor and --pipeline say; alone, one process does it. The written checkpoint is read back and
compared with the source bit by bit before the command says it is done.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from checkpoint_tools import megatron_directory
from checkpoint_tools.hf_directory import HFDirectory
from model_providers import backend as backends
from model_providers.backend import Backend
from model_providers.parallel import Layout, ParallelState
from model_providers.qwen3_vl import Head, Qwen3VLModel
from model_providers.weight_map import iter_hf_weights, load_hf_weights


def convert(
    hf: Path, out: Path, layout: Layout, backend: Backend, value_head: Path | None = None
) -> None:
    """Write `out` from `hf` and check it; all ranks call this.

    value_head: a value_head.pt, for a directory whose shards have no head.

    Raises:
        ValueError: the layout does not fit, weights and config disagree, or the written checkpoint
            differs from the source.
    """
    backend.check(layout)
    source = HFDirectory(hf, value_head)
    source.config.check_layout(layout)
    backend.init_process_group()
    parallel = ParallelState.create(layout)
    backend.seed(0, parallel)
    model = Qwen3VLModel(source.config, parallel, backend, head_of(source)).to(backend.device)
    load_hf_weights(model, source, str(hf))
    megatron_directory.save(out, model, hf)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    megatron_directory.load(out, model)
    count = 0
    for name, tensor in iter_hf_weights(model):
        expected = source[name].to(tensor)
        if not torch.equal(tensor, expected):
            raise ValueError(f"{out}: {name} differs from {hf} after the conversion")
        count += 1
    if dist.get_rank() == 0:
        print(f"{out}: {count} tensors written and read back bit-equal to {hf}")


def head_of(source: HFDirectory) -> Head:
    """Whether the directory holds a language model or a discriminator."""
    return "score" if any(name.startswith("v_head.") for name in source) else "language"


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the top of the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hf", type=Path, required=True, help="Hugging Face directory")
    parser.add_argument("--out", type=Path, required=True, help="checkpoint to write")
    parser.add_argument("--value-head", type=Path, help="value_head.pt, if no shard has the head")
    parser.add_argument("--tensor", type=int, default=1, help="tensor-parallel ranks")
    parser.add_argument("--pipeline", type=int, default=1, help="pipeline stages")
    parser.add_argument("--backend", default="cpu", choices=("cpu", "cuda"))
    options = parser.parse_args(argv)
    layout = Layout(
        tensor=options.tensor, pipeline=options.pipeline, sequence_parallel=options.tensor > 1
    )
    backend = backends.create(options.backend)
    convert(options.hf, options.out, layout, backend, options.value_head)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
