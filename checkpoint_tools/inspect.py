"""What a checkpoint is: kind, architecture, sizes, types, step, layout of its chunks, versions.

    prism-megatron checkpoint inspect --ckpt runs/sft/checkpoints/step_000400/model

Reads headers and metadata, no weights, and imports no torch, so that any size takes a second.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from checkpoint_tools.command import exit_status
from checkpoint_tools.headers import (
    DTYPES,
    OPTIMIZER,
    QUANTISED,
    hf_directory,
    leading_ones,
    read_metadata,
    read_places,
)
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
    places = read_places(path)
    sizes = {name: math.prod(place.shape) for name, place in places.items()}
    names = DTYPES | QUANTISED
    return {
        "kind": "Hugging Face directory",
        "parameters": sum(sizes.values()),
        "bytes": sum(place.length for place in places.values()),
        "dtypes": _dtypes((names.get(p.dtype, p.dtype), sizes[n]) for n, p in places.items()),
        "files": len({place.file for place in places.values()}),
        "optimizer": False,
    }


def _megatron(path: Path) -> dict[str, Any]:
    record = read_metadata(path)
    weights = defaultdict[str, list[dict[str, Any]]](list)
    for chunk in record["tensors"]:
        if not chunk["key"].startswith(OPTIMIZER):
            weights[chunk["key"]].append(chunk)
    sizes = {key: math.prod(chunks[0]["shape"]) for key, chunks in weights.items()}
    places = [*record["tensors"], *record["objects"]]
    return {
        "kind": "Megatron checkpoint (torch_dist)",
        "parameters": sum(sizes.values()),
        "bytes": sum(place["length"] for place in places),
        "dtypes": _dtypes((chunks[0]["dtype"], sizes[key]) for key, chunks in weights.items()),
        "files": len({place["file"] for place in places}),
        "optimizer": any(chunk["key"].startswith(OPTIMIZER) for chunk in record["tensors"]),
        # by as many tensor-parallel ranks; loading works at any other layout. The halves of fc1
        # (gate, up) are always apart
        "written_in_pieces": max(
            _pieces(chunks) for key, chunks in weights.items() if "linear_fc1" not in key
        ),
    }


def _pieces(chunks: Sequence[dict[str, Any]]) -> int:
    """Into how many parts one layer's tensor is cut."""
    # layers and experts are stacked on leading axes, on which a chunk has one of them
    stacked = min(leading_ones(chunk["sizes"]) for chunk in chunks)
    return len({chunk["offsets"][stacked:] for chunk in chunks})


def _dtypes(counted: Iterable[tuple[str, int]]) -> dict[str, int]:
    """Parameters of each type."""
    found: Counter[str] = Counter()
    for dtype, count in counted:
        found[dtype] += count
    return dict(found)


def _shown(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {number:,}" for key, number in value.items())
    if name == "bytes":
        return f"{value:,} ({value / 2**30:.3g} GiB)"
    return f"{value:,}" if isinstance(value, int) else str(value)


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
            table.add_row(name, _shown(name, value))
    Console().print(table)
    return 0


if __name__ == "__main__":
    raise SystemExit(exit_status(main))
