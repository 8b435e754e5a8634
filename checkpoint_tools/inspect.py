"""What a checkpoint is: kind, architecture, sizes, types, step, layout of its chunks, versions.

    prism-megatron checkpoint inspect --ckpt runs/sft/checkpoints/step_000400/model

Reads headers and metadata, no weights, so that any size takes a second.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from checkpoint_tools.command import exit_status
from checkpoint_tools.hf_directory import HFDirectory
from checkpoint_tools.megatron_directory import hf_directory
from checkpoint_tools.torch_dist import OPTIMIZER, TorchDistReader
from model_providers.architecture import Qwen3VLConfig


def inspect(path: Path) -> dict[str, Any]:
    """Everything that the table shows.

    Raises:
        FileNotFoundError: neither format, or incomplete.
        ValueError: an index, a header or the metadata is damaged.
    """
    hf = hf_directory(path)
    raw = json.loads((hf / "config.json").read_text())
    found = _hugging_face(path) if hf == path else _megatron(path)
    config = Qwen3VLConfig.from_hf(hf)
    state = path.parent / "state.json"
    return {
        "path": str(path),
        **found,
        "architecture": raw["model_type"],
        "discriminator": raw.get("prism_discriminator", {}).get("architecture"),
        "layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "experts": config.num_experts,
        "transformers_version": raw.get("transformers_version"),
        "step": json.loads(state.read_text())["step"] if state.exists() else None,
    }


def _hugging_face(path: Path) -> dict[str, Any]:
    weights = HFDirectory(path)
    tensors = [weights.like(name) for name in weights]
    return {
        "kind": "Hugging Face directory",
        "parameters": sum(tensor.numel() for tensor in tensors),
        "bytes": sum(tensor.nbytes for tensor in tensors),
        "dtypes": _dtypes((str(t.dtype), t.numel()) for t in tensors),
        "files": len(list(path.glob("*.safetensors"))),
        "optimizer": False,
    }


def _megatron(path: Path) -> dict[str, Any]:
    reader = TorchDistReader(path)
    weights = {k: v for k, v in reader.tensors.items() if not k.startswith(OPTIMIZER)}
    sizes = {key: math.prod(stored.size) for key, stored in weights.items()}
    return {
        "kind": "Megatron checkpoint (torch_dist)",
        "parameters": sum(sizes.values()),
        "bytes": reader.bytes,
        "dtypes": _dtypes((str(v.properties.dtype), sizes[k]) for k, v in weights.items()),
        "files": len(list(path.glob("*.distcp"))),
        "optimizer": len(weights) < len(reader.tensors),
        # of the widest matrix; loading works at any other layout
        "written_in_pieces": max(_pieces(stored) for stored in weights.values()),
    }


def _pieces(stored: Any) -> int:
    """Into how many parts one layer's tensor is cut."""
    stacked = len(stored.size) > 2
    layers = len({chunk.offsets[0] for chunk in stored.chunks}) if stacked else 1
    return math.ceil(len(stored.chunks) / layers)


def _dtypes(counted: Any) -> dict[str, int]:
    found: Counter[str] = Counter()
    for dtype, count in counted:
        found[dtype.removeprefix("torch.")] += count
    return dict(found)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the top of the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ckpt", type=Path, required=True, help="checkpoint of either format")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(argv)
    found = inspect(options.ckpt)
    if options.json:
        print(json.dumps(found, indent=2))
        return 0
    table = Table(title=str(options.ckpt), show_header=False)
    for name, value in found.items():
        if value is not None:
            table.add_row(name, f"{value:,}" if isinstance(value, int) else str(value))
    Console().print(table)
    return 0


if __name__ == "__main__":
    raise SystemExit(exit_status(main))
