"""Compare a Megatron checkpoint with a Hugging Face directory, or two of either kind.

    prism-megatron checkpoint verify --hf Qwen/Qwen3-VL-4B-Instruct --ckpt ckpt/qwen3vl-4b

Names both ways, shapes, types and every bit; then, if memory allows, what both compute for one
fixed image and text, ours in megatron.core and theirs in transformers, in fp32. Exit status 1 if
anything differs. Tensors pass through memory one at a time; under torchrun the ranks share them.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForImageTextToText

from checkpoint_tools import hub, world
from checkpoint_tools.command import exit_status
from checkpoint_tools.headers import hf_directory
from checkpoint_tools.hf_directory import HFDirectory
from checkpoint_tools.megatron_directory import load_model
from checkpoint_tools.megatron_weights import MegatronWeights, head_of, ignored_names
from checkpoint_tools.weights import Difference, compare
from model_providers import backend as backends
from model_providers.architecture import Qwen3VLConfig
from model_providers.parallel import Layout, ParallelState

LOGITS_TOLERANCE = 1e-4
"""Largest difference of fp32 results, in units of the largest one."""


def open_weights(path: Path) -> HFDirectory | MegatronWeights:
    """The weights at `path`, whichever of the two formats it is in."""
    return HFDirectory(path) if hf_directory(path) == path else MegatronWeights(path)


@dataclass(frozen=True)
class _Example:
    """A sequence with one image between its tokens, as the model reads it (qwen3_vl.Batch)."""

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    padding_mask: Tensor
    section: Tensor
    visual_index: Tensor
    feature_index: Tensor
    pixel_values: Tensor
    grids: tuple[tuple[int, int, int], ...]
    exchange: None = None
    noise: tuple[()] = ()
    dropout: tuple[()] = ()
    routes: None = None


GRID = (1, 6, 4)


def _example(config: Qwen3VLConfig, reference: Any) -> tuple[_Example, dict[str, Tensor]]:
    """Fixed random tokens and an image, and the same as transformers takes them. Positions are
    those of transformers, too."""
    generator = torch.Generator().manual_seed(0)
    vision_start = reference.config.vision_start_token_id
    limit = min(config.image_token_id, config.video_token_id, vision_start)
    text = torch.randint(0, limit, (2, 24), generator=generator)
    visual = torch.full((GRID[1] * GRID[2] // config.vision.spatial_merge_size**2,), 0)
    visual += config.image_token_id
    ids = torch.cat([text[0], torch.tensor([vision_start]), visual, text[1]])
    pixels = torch.randn(GRID[1] * GRID[2], config.vision.patch_dim, generator=generator)
    inputs = dict(
        input_ids=ids[None],
        attention_mask=torch.ones_like(ids)[None],
        mm_token_type_ids=(ids == config.image_token_id).int()[None],
        image_grid_thw=torch.tensor([GRID]),
    )
    positions, _ = reference.model.get_rope_index(**inputs)
    places = (ids == config.image_token_id).nonzero().flatten()
    example = _Example(
        input_ids=ids,
        labels=torch.cat([ids[1:], ids[:1] * 0]),
        position_ids=positions[:, 0],
        cu_seqlens=torch.tensor([0, len(ids)], dtype=torch.int32),
        padding_mask=torch.zeros(len(ids), dtype=torch.bool),
        section=torch.zeros(len(ids), dtype=torch.int64),
        visual_index=places,
        feature_index=torch.arange(len(places)),
        pixel_values=pixels,
        grids=(GRID,),
    )
    return example, inputs | {"pixel_values": pixels}


@torch.no_grad()
def logits_distance(hf: Path, ckpt: Path) -> float:
    """How far log-probabilities (of a discriminator: scores) of the two are apart on the fixed
    example, in units of the largest one; in fp32, in this process alone."""
    weights = HFDirectory(hf)
    config, head = weights.config, head_of(weights)
    reference = AutoModelForImageTextToText.from_pretrained(hf, dtype=torch.float32).eval()
    example, inputs = _example(config, reference)
    states = reference.model(**inputs).last_hidden_state[0]
    if head == "score":
        [name] = config.value_heads
        wanted = states @ weights[name][0].float()
    else:
        logprobs = reference.lm_head(states).log_softmax(-1)
        wanted = logprobs.gather(1, example.labels[:, None]).flatten()
    del reference
    backend = backends.create("cpu")
    backend.init_process_group()
    parallel = ParallelState.create(Layout())
    backend.seed(0, parallel)
    [model] = load_model(ckpt, parallel, backend, head).eval().chunks
    found = model(example).flatten()
    # after the last token comes nothing
    return float((found - wanted)[:-1].abs().max() / wanted[:-1].abs().max())


def why_no_logits(config: Qwen3VLConfig, nbytes: int) -> str | None:
    """The reason, if what both compute can't be compared here."""
    if config.dedicated:
        return "transformers has no model whose experts belong to sections"
    if dist.get_world_size() > 1:
        return "several ranks; run verify in one process"
    # transformers' weights and ours, both in fp32, one after the other but for an instant
    needed = 2 * 2 * nbytes
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > free:
        return f"needs {needed / 2**30:.0f} GiB of memory and {free / 2**30:.0f} GiB are free"
    return None


def verify(first: Path, second: Path, logits: bool = True) -> dict[str, Any]:
    """Everything that the table shows. `second` may be of either format."""
    a, b = open_weights(first), open_weights(second)
    found = compare(a, b, ignored_names(a, first) | ignored_names(b, second))
    report: dict[str, Any] = {
        "first": str(first),
        "second": str(second),
        "tensors": found.tensors,
        "bytes": found.bytes,
        "differences": [asdict(difference) for difference in found.differences],
        "logits": None,
    }
    if not logits or not (isinstance(a, HFDirectory) and isinstance(b, MegatronWeights)):
        return report | {"logits_skipped": "not asked for" if not logits else "not HF and Megatron"}
    if reason := why_no_logits(a.config, found.bytes):
        return report | {"logits_skipped": reason}
    if found.differences:
        return report | {"logits_skipped": "the weights differ"}
    report["logits"] = distance = logits_distance(first, second)
    if not distance <= LOGITS_TOLERANCE:
        detail = f"{distance:.1e} of the largest apart, at most {LOGITS_TOLERANCE:.0e} is rounding"
        report["differences"].append(asdict(Difference("results", "logits", detail)))
    return report


def _table(report: dict[str, Any]) -> Table:
    table = Table(title=f"{report['first']} against {report['second']}")
    for column in ("check", "result"):
        table.add_column(column)
    kinds = ("missing", "surplus", "shape", "dtype", "value")
    table.add_row("tensors", f"{report['tensors']} compared, {report['bytes'] / 2**20:.1f} MiB")
    for kind in kinds:
        names = [d["name"] for d in report["differences"] if d["kind"] == kind]
        table.add_row(kind, ", ".join(names[:3]) + f" ({len(names)})" if names else "none")
    skipped, distance = report.get("logits_skipped"), report["logits"]
    table.add_row("logits", f"not compared: {skipped}" if skipped else f"{distance:.1e} apart")
    return table


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the top of the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hf", required=True, help="Hugging Face directory or hub id")
    parser.add_argument("--ckpt", type=Path, required=True, help="checkpoint of either format")
    parser.add_argument("--no-logits", action="store_true", help="compare weights only")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(argv)
    world.join()
    report = verify(hub.local(options.hf), options.ckpt, not options.no_logits)
    if dist.get_rank() == 0:
        if options.json:
            print(json.dumps(report, indent=2))
        else:
            Console().print(_table(report))
    return 1 if report["differences"] else 0


if __name__ == "__main__":
    raise SystemExit(exit_status(main))
