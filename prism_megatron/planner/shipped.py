"""Writes configs/layouts/ and the table of docs/scaling.md by the planner; two minutes.

    python -m prism_megatron.planner.shipped

A layout serves every number of GPUs on which it is nearly as fast as the fastest. Files that no
longer belong to any are removed.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from checkpoint_tools.files import write_atomically
from model_providers.presets import PRESETS
from prism_megatron.planner.command import (
    GB,
    describe,
    describe_saving,
    explain,
    scaling_table,
)
from prism_megatron.planner.hardware import GPU, H100, H200
from prism_megatron.planner.overlay import layout_file, to_yaml
from prism_megatron.planner.search import FILL, Candidate, Request, search

ROOT = Path(__file__).resolve().parents[2]
GPUS = (8, 16, 64, 256)
SEQUENCE, SEQUENCES, PATCHES = 8192, 512, 4096
"""What layouts are made for: tokens of a sequence, sequences of a step, patches of its image."""
NEARLY = 1.1
"""A layout that another number of GPUs has already may be so much slower."""
SCALING_MODELS = ("qwen3-vl-8b", "qwen3-vl-32b", "qwen3-vl-30b-a3b", "qwen3-vl-235b-a22b")
SCALING_GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
MARKS = ("<!-- table: python -m prism_megatron.planner.shipped -->", "<!-- end of table -->")


def request(model: str, gpus: int, gpu: GPU, sequences: int = SEQUENCES) -> Request:
    return Request(
        model=model,
        config=PRESETS[model],
        gpus=gpus,
        gpu=gpu,
        memory=FILL * gpu.gigabytes * GB,
        sequence=SEQUENCE,
        sequences=sequences,
        patches=PATCHES,
    )


def shared_layouts(model: str, gpu: GPU) -> list[tuple[Candidate, list[int]]]:
    """A model's layouts, and the numbers of GPUs that each is for."""
    shared: list[tuple[Candidate, list[int]]] = []
    for gpus in GPUS:
        asked = request(model, gpus, gpu)
        found = search(asked).candidates
        if not found:
            continue
        for candidate, counts in shared:
            again = replace(candidate, request=found[0].request)
            is_near = again.fits and again.rank <= NEARLY * found[0].rank
            # nobody gets offload for others' sake
            if is_near and candidate.offload == found[0].offload:
                counts.append(gpus)
                break
        else:
            shared.append((found[0], [gpus]))
    return shared


def file_name(candidate: Candidate, counts: list[int]) -> str:
    """With a number of GPUs, unless it is for any number from the largest on."""
    size = f"{candidate.request.gpu.gigabytes}gb"
    model = candidate.request.model
    return f"{model}-{size}" if counts[-1] == GPUS[-1] else f"{model}-{counts[0]}x{size}"


def write_between_marks(page: Path, lines: list[str]) -> None:
    """Put a table where the page has its place."""
    before, found, rest = page.read_text().partition(MARKS[0])
    assert found, page
    table = "\n".join(lines)
    write_atomically(
        page, f"{before}{MARKS[0]}\n\n{table}\n\n{MARKS[1]}{rest.partition(MARKS[1])[2]}"
    )


def main() -> None:
    """Write all of them."""
    folder = ROOT / "configs" / "layouts"
    names = set()
    table = ["| file | GPUs | layout | saving | GB |", "|---|---|---|---|---|"]
    for model in PRESETS:
        for gpu in (H100, H200):
            for candidate, counts in shared_layouts(model, gpu):
                name = file_name(candidate, counts)
                names.add(name)
                text = to_yaml(layout_file(candidate, counts), explain(candidate))
                write_atomically(folder / f"{name}.yaml", text)
                sizes = describe(candidate.layout, counts[0]).rpartition("DP")[0].strip()
                table.append(
                    f"| {name} | {', '.join(map(str, counts))} | {sizes or 'data parallel'} | "
                    f"{describe_saving(candidate)} | {candidate.peak / GB:.0f} |"
                )
    for path in folder.glob("*.yaml"):
        if path.stem not in names:
            path.unlink()
    write_between_marks(folder / "README.md", table)
    requests = [
        request(model, gpus, H100, sequences=1024)
        for model in SCALING_MODELS
        for gpus in SCALING_GPUS
    ]
    write_between_marks(ROOT / "docs" / "scaling.md", scaling_table(requests).splitlines())


if __name__ == "__main__":
    main()
