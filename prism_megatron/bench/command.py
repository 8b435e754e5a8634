r"""`prism-megatron bench`: what training, sampling, weight syncs and whole steps reach.

    torchrun --nproc-per-node 4 -m prism_megatron bench train --backend cuda --model qwen3-vl-8b \
        --tensor 1 2 --fp8 off tensorwise --out DIR
    torchrun ... bench step rlvr --config configs/quickstart/rlvr.yaml --out DIR
    torchrun ... bench rollout --config sync-check.yaml --out DIR      # and so with sync
    prism-megatron bench show DIR/*.json [--baseline FILE ...] [--plot FILE.png]

train has synthetic rows and random weights; the others take a stage's configuration and its data.
Each run writes a JSON file with its configuration, versions and commit.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from rich.console import Console

from checkpoint_tools.files import write_atomically
from prism_megatron.bench import engines, results, stage, train
from prism_megatron.config.load import unknown

KINDS: dict[str, tuple[Callable[[argparse.ArgumentParser], None], Callable[..., Any], str]] = {
    "train": (train.add_arguments, train.run, "training steps with synthetic rows"),
    "rollout": (engines.add_arguments, engines.rollout, "responses of the rollout engines"),
    "sync": (engines.add_arguments, engines.sync, "weights to the rollout engines"),
    "step": (stage.add_arguments, stage.run, "whole steps of a stage, by phase"),
}


def main(arguments: Sequence[str]) -> int:
    """Run, write and show."""
    kind, *rest = arguments or ["--help"]
    if kind in ("-h", "--help"):
        print(__doc__)
        return 0
    if kind not in (*KINDS, "show"):
        raise ValueError(unknown("benchmark", kind, [*KINDS, "show"]))
    options = _parser(kind).parse_intermixed_args(rest)
    baseline = results.read(options.baseline)
    if kind == "show":
        _show(results.read(options.results), baseline, options.plot)
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    found = {}
    for name, result in KINDS[kind][1](options):
        found[name] = result
        if dist.get_rank() == 0:
            write_atomically(options.out / f"{name}.json", json.dumps(result, indent=2) + "\n")
    if dist.get_rank() == 0:
        _show(found, baseline, options.plot)
    dist.barrier()
    return 0


def _show(
    found: dict[str, results.Result], baseline: dict[str, results.Result], plot: Path | None
) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    console.print(results.table(found, baseline))
    if plot is not None:
        write_atomically(plot, results.plot(found))


def _parser(kind: str) -> argparse.ArgumentParser:
    add_arguments, _, meaning = KINDS.get(kind, (None, None, "results beside each other"))
    parser = argparse.ArgumentParser(prog=f"prism-megatron bench {kind}", description=meaning)
    add = parser.add_argument
    if add_arguments is None:
        add("results", nargs="+", type=Path, metavar="JSON")
    else:
        add_arguments(parser)
        add("--out", type=Path, required=True, metavar="DIR", help="gets a JSON file for each run")
    add("--baseline", nargs="+", type=Path, default=[], metavar="JSON", help="compare with these")
    add("--plot", type=Path, metavar="PNG", help="tokens a second over GPUs")
    return parser
