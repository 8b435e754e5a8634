"""Average or interpolate checkpoints of one architecture, of either format.

    prism-megatron checkpoint merge --inputs runs/a/hf runs/b/hf --out soup
    prism-megatron checkpoint merge --inputs sft/hf rlvr/hf --weights 0.3 0.7 --out between

Tensors pass through memory one at a time and are added up in fp32.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from checkpoint_tools import hf_writer, hub, world
from checkpoint_tools.command import exit_status
from checkpoint_tools.files import identity, new_folder
from checkpoint_tools.headers import hf_directory
from checkpoint_tools.hf_directory import HFDirectory
from checkpoint_tools.hf_writer import TransformersLayout
from checkpoint_tools.megatron_directory import differences
from checkpoint_tools.megatron_weights import structure_of
from checkpoint_tools.verify import open_weights
from checkpoint_tools.weights import StoredWeights
from model_providers.architecture import Qwen3VLConfig


class _Merged(StoredWeights):
    """The weighted sum, made when asked for; of the first one's types."""

    def __init__(self, inputs: list[StoredWeights], shares: list[float]) -> None:
        self.inputs, self.shares = inputs, shares

    def __iter__(self) -> Iterator[str]:
        return iter(self.inputs[0])

    def __len__(self) -> int:
        return len(self.inputs[0])

    def like(self, name: str) -> Tensor:
        return self.inputs[0].like(name)

    def file_of(self, name: str) -> Path:
        return self.inputs[0].file_of(name)

    def __getitem__(self, name: str) -> Tensor:
        return self._sum([weights[name] for weights in self.inputs])

    def expert(self, name: str, index: int) -> Tensor:
        return self._sum([weights.expert(name, index) for weights in self.inputs])

    def _sum(self, tensors: list[Tensor]) -> Tensor:
        total = torch.zeros_like(tensors[0], dtype=torch.float32)
        for share, tensor in zip(self.shares, tensors, strict=True):
            total += share * tensor.float()
        return total.to(tensors[0].dtype)


def merge(
    inputs: list[Path], out: Path, shares: list[float], layout: TransformersLayout = "4.57"
) -> None:
    """Write `out`, a Hugging Face directory with the first input's config and processor.

    Raises ValueError if the inputs are of different architectures or the shares don't add up to 1.
    """
    if len(inputs) < 2 or len(shares) != len(inputs):
        raise ValueError(
            f"{len(inputs)} inputs with {len(shares)} weights; give at least two, one each"
        )
    if not math.isclose(sum(shares), 1.0, rel_tol=1e-6):
        raise ValueError(f"the weights {shares} add up to {sum(shares):g}, not to 1")
    weights = [open_weights(path) for path in inputs]
    first = Qwen3VLConfig.from_hf(hf_directory(inputs[0]))
    for path, other in zip(inputs, weights, strict=True):
        if different := differences(Qwen3VLConfig.from_hf(hf_directory(path)), first):
            raise ValueError(f"{path} is of another architecture than {inputs[0]}: {different}")
        if isinstance(other, HFDirectory):
            structure_of(other)
        if different := sorted(set(other) ^ set(weights[0])):
            raise ValueError(f"{path} and {inputs[0]} differ in {different[:5]}")
    job = {"from": identity(*inputs), "merged": [str(path) for path in inputs], "shares": shares}
    hf_writer.export(out, _Merged(weights, shares), hf_directory(inputs[0]), job, layout)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the top of the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--inputs",
        nargs="+",
        required=True,
        help="Megatron checkpoints, Hugging Face directories or hub ids",
    )
    parser.add_argument("--weights", type=float, nargs="+", help="share of each (default: equal)")
    parser.add_argument("--out", type=new_folder, required=True, help="directory to write")
    hf_writer.add_layout(parser)
    options = parser.parse_args(argv)
    world.join()
    inputs = [hub.local(source) for source in options.inputs]
    count = len(inputs)
    shares = options.weights or [1 / count] * count
    merge(inputs, options.out, shares, options.transformers_layout)
    if world.rank_and_size()[0] == 0:
        print(f"{options.out}: {count} checkpoints in shares {shares}")
    return 0


if __name__ == "__main__":
    raise SystemExit(exit_status(main))
