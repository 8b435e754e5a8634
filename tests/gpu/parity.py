"""The end of tests/gpu/run.sh: the training steps that it measured, whether layouts agree."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from rich.console import Console

from prism_megatron.bench import results


def parity(folder: Path) -> tuple[str, bool]:
    """Layouts against one GPU, as Markdown, and whether all are near: loss to 1e-3, gradient norm
    to 3 percent. The file of one GPU is parity-1.json."""
    lines = ["| layout | model | loss, relative | gradient norm, relative |", "|---|---|---|---|"]
    one = json.loads((folder / "parity-1.json").read_text())
    near = True
    for file in sorted(folder.glob("parity-*.json")):
        result = json.loads(file.read_text())
        for head in ("language", "score"):
            loss, norm = (
                abs(result[head][key] / one[head][key] - 1) for key in ("loss", "grad_norm")
            )
            lines.append(
                f"| {file.stem.removeprefix('parity-')} | {head} | {loss:.1e} | {norm:.1e} |"
            )
            near &= loss <= 1e-3 and norm <= 0.03
    return "\n".join(lines), near


def main(folder: Path) -> int:
    files = [*folder.glob("*/train-*.json"), *folder.glob("baseline*.json")]
    Console(width=160).print(results.table(results.read(sorted(files)), {}))
    if not (folder / "parity-1.json").exists():
        return 0
    text, near = parity(folder)
    print(text)
    return 0 if near else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
