r"""`prism-megatron plan`: layouts that fit, by estimated step time, with memory by part and bounds.

    prism-megatron plan --model qwen3-vl-235b-a22b --gpus 256 --gpu-memory 80 --seq 16384
    prism-megatron plan --model qwen3-vl-8b --gpus 8 --gpu-memory 80 --seq 8192 --stage rlvr \
        --out DIR
    prism-megatron plan --model qwen3-vl-8b qwen3-vl-32b --gpus 8 64 --gpu-memory 80 --seq 8192

Several models or numbers of GPUs give a table in Markdown with the fastest layout of each.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from checkpoint_tools.files import write_atomically
from checkpoint_tools.headers import hf_directory
from model_providers.architecture import Qwen3VLConfig
from model_providers.parallel import Layout
from model_providers.presets import PRESETS
from prism_megatron.planner import hardware, overlay
from prism_megatron.planner.hardware import H100, H200
from prism_megatron.planner.search import (
    FILL,
    MOST_GPUS,
    Candidate,
    Found,
    Request,
    fewest_gpus,
    model_flops,
    search,
)

GB = 1e9
SEQUENCES = {"sft": 128, "align": 64, "rlvr": 512}
"""Of a step, as in configs/prism/."""
ASSUMED = (
    "Estimates: all sequences as long as --seq, one update a step, nothing frozen; rollouts, "
    "weight sync and the discriminator's time are not in it. Links between hosts are assumed to "
    f"bring {hardware.NETWORK / GB:.0f} GB/s a GPU."
)


def main(arguments: Sequence[str]) -> int:
    """Print plans; 1 if nothing fits."""
    options = _parser().parse_args(arguments)
    requests = [_request(options, model, gpus) for model in options.model for gpus in options.gpus]
    if len(requests) > 1:
        print(scaling_table(requests))
        return 0
    [request] = requests
    found = search(request)
    if not found.candidates:
        print(nothing_fits(request, found))
        return 1
    best = found.candidates[: options.top]
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    console.print(_memory_table(request, best))
    console.print(_time_table(request, best))
    print(ASSUMED)
    for number, candidate in enumerate(best if options.out else [], 1):
        name = f"{request.model}-{request.gpus}x{request.gpu.gigabytes}gb-{request.stage}"
        file = options.out / f"{name}-{number}.yaml"
        options.out.mkdir(parents=True, exist_ok=True)
        write_atomically(file, overlay.to_yaml(overlay.overlay(candidate), explain(candidate)))
        print(f"wrote {file}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="prism-megatron plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", nargs="+", required=True, metavar="NAME_OR_DIR", help=f"{', '.join(PRESETS)}")
    add("--gpus", nargs="+", type=int, required=True, metavar="N")
    add("--gpu-memory", type=int, required=True, metavar="GB", help="80 (H100) or 141 (H200)")
    add("--seq", type=int, required=True, metavar="TOKENS", help="of the longest sequence")
    add("--stage", choices=SEQUENCES, default="sft")
    add("--global-batch", type=int, metavar="N", help="sequences a step; default by stage")
    add("--patches", type=int, default=4096, metavar="N", help="of each sequence's image; 4096")
    add("--fp8", choices=("tensorwise", "blockwise"), help="of the decoder; default BF16")
    add("--fp8-param-gather", action="store_true", help="and its weights; see the key of that name")
    add(
        "--vision", choices=("sharded", "replicated"), default="sharded", help="as the key; sharded"
    )
    add("--top", type=int, default=3, metavar="N", help="how many to print; 3")
    add("--out", type=Path, metavar="DIR", help="write them as overlays of the stage")
    return parser


def _request(options: argparse.Namespace, model: str, gpus: int) -> Request:
    name, config = _architecture(model)
    sequences = options.global_batch or SEQUENCES[options.stage]
    cards = {gpu.gigabytes: gpu for gpu in (H100, H200)}
    if options.gpu_memory not in cards:
        raise ValueError(
            f"--gpu-memory {options.gpu_memory}: no GPU of that size is known; give "
            f"{' or '.join(f'{size} ({gpu.name})' for size, gpu in cards.items())}"
        )
    for flag, value in (
        ("--gpus", gpus),
        ("--seq", options.seq),
        ("--global-batch", sequences),
        ("--top", options.top),
    ):
        if value < 1:
            raise ValueError(f"{flag} {value} must be 1 or more")
    if gpus > hardware.NODE and gpus % hardware.NODE:
        raise ValueError(
            f"--gpus {gpus}: hosts have {hardware.NODE} GPUs each; give a multiple of that"
        )
    visual = options.patches / config.vision.spatial_merge_size**2
    if not 0 <= visual <= options.seq:
        raise ValueError(
            f"--patches {options.patches} make {visual:.0f} tokens of an image, but a sequence has "
            f"{options.seq}; lower it"
        )
    if options.fp8_param_gather and options.fp8 is None:
        raise ValueError("--fp8-param-gather holds weights as --fp8 computes with them; give both")
    gpu = cards[options.gpu_memory]
    return Request(
        model=name,
        config=config,
        gpus=gpus,
        gpu=gpu,
        memory=FILL * gpu.gigabytes * GB,
        sequence=options.seq,
        sequences=sequences,
        patches=options.patches,
        stage=options.stage,
        fp8=options.fp8,
        fp8_param_gather=options.fp8_param_gather,
        vision=options.vision,
    )


def _architecture(model: str) -> tuple[str, Qwen3VLConfig]:
    if model in PRESETS:
        return model, PRESETS[model]
    path = Path(model)
    if not path.exists():
        raise ValueError(
            f"--model {model!r} is neither a directory nor one of {', '.join(PRESETS)}"
        )
    return path.resolve().name, Qwen3VLConfig.from_hf(hf_directory(path))


def nothing_fits(request: Request, found: Found) -> str:
    """What is the smallest that would."""
    message = (
        f"{request.model} does not fit {request.gpus} GPUs of {request.gpu.gigabytes} GB at "
        f"{request.sequence} tokens: the smallest layout takes {found.least / GB:.0f} GB of each, "
        f"{request.memory / GB:.0f} are planned with"
    )
    if enough := fewest_gpus(request):
        gpus, candidate = enough
        return f"{message}. {gpus} GPUs are enough: {describe(candidate.layout, gpus)}"
    return f"{message}. {MOST_GPUS} GPUs are not enough either; lower --seq"


def describe(layout: Layout, gpus: int) -> str:
    """A layout in a few letters, the sizes above 1."""
    parts = {
        "TP": layout.tensor,
        "CP": layout.context,
        "PP": layout.pipeline,
        "VPP": layout.virtual_pipeline,
        "EP": layout.expert,
        "ETP": layout.expert_tensor,
    }
    found = [f"{name}{size}" for name, size in parts.items() if size > 1]
    found += ["replicated tower"] * (layout.vision == "replicated")
    return " ".join([*found, f"DP{layout.data(gpus)}"])


def describe_saving(candidate: Candidate) -> str:
    """What is computed again, and where the optimizer's state lies."""
    recompute, words = candidate.recompute, []
    if recompute.granularity == "full":
        words.append(f"{recompute.layers or 'all'} layers")
    words += recompute.modules
    words += ["vision"] * recompute.vision
    found = ["recompute " + ", ".join(words)] if words else []
    if candidate.offload:
        host = min(hardware.NODE, candidate.request.gpus) * candidate.memory.optimizer
        found.append(f"offload of {host / GB:,.0f} GB a host")
    return "; ".join(found) or "-"


def _memory_table(request: Request, best: list[Candidate]) -> Table:
    table = Table(
        title=f"{request.model}, {request.gpus} GPUs of {request.gpu.gigabytes} GB: GB of each GPU"
    )
    table.add_column("layout")
    table.add_column("saving")
    # of a sleeping engine, contexts, buffers, a discriminator
    columns = ("weights", "grads", "FP8", "optimizer", "language", "head", "vision", "others")
    for name in (*columns, "peak"):
        table.add_column(name, justify="right")
    if best[0].engine:
        table.add_column("engine while sampling")
    for one in best:
        found = one.memory
        values = (
            found.weights,
            found.gradients,
            found.fp8,
            found.optimizer,
            found.language,
            found.head,
            found.vision,
            one.others.held,
            one.peak,
        )
        cells = [f"{value / GB:.1f}" for value in values]
        if one.engine:
            cells.append(
                f"TP{one.engine.tensor}: {one.engine.weights / GB:.0f} weights, "
                f"{one.engine.cache / GB:.0f} cache ({one.engine.tokens / 1000:,.0f}k tokens)"
            )
        table.add_row(
            describe(one.layout, request.gpus),
            describe_saving(one),
            *cells,
        )
    return table


def _time_table(request: Request, best: list[Candidate]) -> Table:
    table = Table(
        title=f"seconds of a step of {request.sequences} sequences of {request.sequence} tokens"
    )
    table.add_column("layout")
    columns = ("micro-batches", "step", "tokens/s/GPU", "MFU", "compute", "HBM", "NVLink")
    for name in (*columns, "network", "host", "bubble", "waiting for links", "update", "gaps"):
        table.add_column(name, justify="right")
    for one in best:
        time, bounds = one.time, one.time.bounds
        links = time.tensor + time.context + time.experts + time.pipeline + time.gradients
        table.add_row(
            describe(one.layout, request.gpus),
            f"{one.micro_batches} x {one.row_tokens}",
            f"{time.total:.2f}",
            f"{tokens_per_second(one):,.0f}",
            f"{mfu(one):.0%}",
            f"{bounds.compute:.2f}",
            f"{bounds.hbm:.2f}",
            f"{bounds.nvlink:.2f}",
            f"{bounds.network:.2f}",
            f"{bounds.host:.2f}",
            f"{time.bubble / time.total:.0%}",
            f"{links:.2f}",
            f"{time.update:.2f}",
            f"{time.gaps:.2f}",
        )
    return table


def explain(candidate: Candidate) -> str:
    """What was estimated, for the top of a file."""
    request = candidate.request
    return (
        f"Estimated on {request.gpus} GPUs: {candidate.time.total:.1f} s a step of "
        f"{request.sequences} sequences of {request.sequence} tokens,\n"
        f"{candidate.peak / GB:.0f} GB, micro-batches of {candidate.row_tokens} tokens."
    )


def tokens_per_second(candidate: Candidate) -> float:
    """Of each GPU."""
    request = candidate.request
    return request.sequences * request.sequence / candidate.time.total / request.gpus


def mfu(candidate: Candidate) -> float:
    """Against the BF16 peak, in FP8 too."""
    request = candidate.request
    return model_flops(request) / candidate.time.total / request.gpus / request.gpu.bf16


def scaling_table(requests: list[Request]) -> str:
    """The fastest layout of each, in Markdown."""
    lines = [
        "| model | GPUs | layout | saving | GB of each | step, s | tokens/s/GPU | MFU | bubble |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for request in requests:
        found = search(request).candidates
        if not found:
            lines.append(f"| {request.model} | {request.gpus} | does not fit | | | | | | |")
            continue
        one = found[0]
        lines.append(
            f"| {request.model} | {request.gpus:,} | {describe(one.layout, request.gpus)} | "
            f"{describe_saving(one)} | {one.peak / GB:.0f} | "
            f"{one.time.total:.1f} | {tokens_per_second(one):,.0f} | "
            f"{mfu(one):.0%} | {one.time.bubble / one.time.total:.0%} |"
        )
    return "\n".join(lines)
