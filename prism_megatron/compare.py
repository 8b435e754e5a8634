"""A table over seeds: what alignment before RLVR changes.

    python -m prism_megatron.compare runs/compare/seed-1 runs/compare/seed-2 --out docs/results

Each folder is a finished quickstart with one more stage, rlvr_direct: RLVR from the SFT model.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from checkpoint_tools.files import write_atomically
from prism_megatron.config.load import provenance

STAGES = {
    "sft": "SFT",
    "align": "SFT, alignment",
    "rlvr_direct": "SFT, RLVR",
    "rlvr": "SFT, alignment, RLVR",
}
METRICS = (
    "answer_accuracy",
    "perception_accuracy",
    "reasoning_given_perception_accuracy",
    "format_rate",
)


def compare(folders: Sequence[Path]) -> dict[str, Any]:
    """Evaluation of every stage in every folder, with mean and standard deviation over folders."""
    runs = {
        str(folder): {stage: _metrics(folder / stage) for stage in STAGES} for folder in folders
    }
    summary = {
        stage: {metric: spread([run[stage][metric] for run in runs.values()]) for metric in METRICS}
        for stage in STAGES
    }
    counts = json.loads((folders[0] / "sft" / "eval.json").read_text())["rows"]
    return {"rows": counts, "runs": runs, "summary": summary, **provenance()}


def _metrics(stage: Path) -> dict[str, float]:
    result = json.loads((stage / "eval.json").read_text())
    return {metric: result["metrics"][metric]["value"] for metric in METRICS}


def spread(values: list[float]) -> dict[str, float | None]:
    """{"mean", "std"} over seeds; a single one has no deviation."""
    return {"mean": mean(values), "std": stdev(values) if len(values) > 1 else None}


def _cell(spread: dict[str, float | None]) -> str:
    deviation = "" if spread["std"] is None else f" ± {100 * spread['std']:.1f}"
    return f"{100 * (spread['mean'] or 0.0):.1f}{deviation}"


def table(result: dict[str, Any]) -> str:
    """The comparison in Markdown."""
    heads = ["answer", "perception", "reasoning given perception", "format"]
    lines = [
        f"Held-out accuracy in percent, {result['rows']} questions, mean and deviation over "
        f"{len(result['runs'])} seeds; single seeds in the last column (answer).",
        "",
        "| stages | " + " | ".join(heads) + " | seeds |",
        "|---" * (len(heads) + 2) + "|",
    ]
    for stage, title in STAGES.items():
        cells = [_cell(spread) for spread in result["summary"][stage].values()]
        seeds = [f"{100 * run[stage]['answer_accuracy']:.1f}" for run in result["runs"].values()]
        lines.append(f"| {title} | " + " | ".join(cells) + f" | {', '.join(seeds)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Command line; see the top of the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path, help="finished quickstart folders")
    parser.add_argument("--out", type=Path, required=True, help="folder of the two result files")
    options = parser.parse_args()
    result = compare(options.folders)
    options.out.mkdir(parents=True, exist_ok=True)
    write_atomically(options.out / "alignment.json", json.dumps(result, indent=2) + "\n")
    write_atomically(options.out / "alignment.md", table(result))
    print(table(result))


if __name__ == "__main__":
    main()
