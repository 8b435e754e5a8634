"""How fast a large data set starts, how fast its rows come, and whether memory stays flat.

    python -m tests.bench_data --dir DIR --json FILE [--rows 1260000] [--parquet-rows 20000]

Writes random demonstrations as one JSON list and as JSON lines, and a parquet file of one row group
with images in it; then, in a process for each, opens it and draws batches as SFT does. `start_s` is
the time until the first batch is there, at the first start (the index is made) and at the second;
resident memory is measured after that and after many more batches. DIR needs room for all three.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
BATCH, WARM_BATCHES = 128, 30
WORDS = 'the angle "x" equals {30} degrees, so \\frac{a}{b} = [1, 2] and the answer is\n'.split(" ")


def demonstrations(count: int) -> Iterator[dict[str, Any]]:
    """Rows as long as the published ones, some 300 words of formulas, quotes and brackets."""
    rng = random.Random(5)
    texts = [" ".join(rng.choices(WORDS, k=rng.randrange(150, 450))) for _ in range(2000)]
    for number in range(count):
        text = texts[number % len(texts)]
        response = f"<caption>{number}</caption>\n<think>{text}</think>\n<answer>7</answer>"
        turns = [{"role": "user", "content": "What is x?"}]
        yield {"messages": [*turns, {"role": "assistant", "content": response}], "images": []}


def write(folder: Path, rows: int, parquet_rows: int) -> dict[str, Path]:
    """The three files, unless they are there."""
    names = {"json": "rows.json", "jsonl": "rows.jsonl", "parquet": "rows.parquet"}
    paths = {kind: folder / name for kind, name in names.items()}
    if not paths["parquet"].exists():
        with paths["json"].open("w") as whole, paths["jsonl"].open("w") as lines:
            for number, row in enumerate(demonstrations(rows)):
                text = json.dumps(row, ensure_ascii=False)
                whole.write(("[" if not number else ",\n") + text)
                lines.write(text + "\n")
            whole.write("]")
        _write_parquet(paths["parquet"], parquet_rows)
    return paths


def _write_parquet(path: Path, rows: int) -> None:
    rng = np.random.default_rng(5)
    table = []
    for row in demonstrations(rows):
        buffer = io.BytesIO()
        noise = rng.integers(0, 256, (112, 112, 3), dtype=np.uint8)
        Image.fromarray(noise).save(buffer, "PNG")
        row["messages"][0]["content"] = "<image>What is x?"
        table.append(row | {"images": [{"bytes": buffer.getvalue(), "path": None}]})
    pq.write_table(pa.Table.from_pylist(table), path, row_group_size=rows)


def measure(path: Path, model: Path, cache: Path, batches: int) -> None:
    """Prints what one start and `batches` batches of a file take."""
    from prism_megatron.config import schema
    from prism_megatron.data.prompts import PromptEncoder
    from prism_megatron.data.rows import SFTRow, read_sft
    from prism_megatron.data.sources import open_sources
    from prism_megatron.data.stream import BatchStream, Quarantine
    from prism_megatron.types import Sequence

    data = schema.Data(path=path, cache_dir=cache)
    encoder = PromptEncoder.from_config(model, data)

    def demonstration(row: SFTRow) -> Sequence:
        return encoder.sft_sequence(encoder.encode_prompt(row), row.response)

    process = psutil.Process()
    start = time.monotonic()
    sources = open_sources(data, read_sft)
    quarantine = Quarantine(cache / "quarantine.jsonl", 0.0)
    stream = BatchStream(
        sources, demonstration, quarantine, batch_size=BATCH, seed=1, num_workers=data.num_workers
    )
    stream.next_batch()
    result = {"rows": len(sources[0]), "start_s": round(time.monotonic() - start, 2)}
    for _ in range(WARM_BATCHES):
        stream.next_batch()
    resident = _resident(process)
    start = time.monotonic()
    for _ in range(batches):
        stream.next_batch()
    result["rows_per_s"] = round(batches * BATCH / (time.monotonic() - start))
    result["rss_mib"] = round(resident / 2**20)
    result["rss_growth_mib"] = round((_resident(process) - resident) / 2**20)
    print(json.dumps(result | {"batches": batches}))


def _resident(process: psutil.Process) -> int:
    """Bytes without those of mapped files, which the system takes back when it needs memory."""
    found = process.memory_info()
    return int(found.rss - found.shared)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=1_260_000)
    parser.add_argument("--parquet-rows", type=int, default=20_000)
    parser.add_argument("--batches", type=int, default=300)
    options = parser.parse_args()
    options.dir.mkdir(parents=True, exist_ok=True)
    from checkpoint_tools import tiny_qwen3vl

    model = options.dir / "model"
    if not model.exists():
        texts = [row["messages"][1]["content"] for row in demonstrations(50)]
        tiny_qwen3vl.create(model, texts, "Answer in sections.", vocab_size=384, seed=1)
    paths = write(options.dir, options.rows, options.parquet_rows)
    cache = options.dir / "cache"
    for file in cache.glob("*"):
        file.unlink()
    result: dict[str, Any] = {
        "machine": f"{os.cpu_count()} x {platform.processor() or platform.machine()}",
        "versions": {name: version(name) for name in ("numpy", "pyarrow", "transformers")},
        "batch_size": BATCH,
    }
    for kind, path in paths.items():
        for name in ("first_start", "second_start"):
            code = (
                "from pathlib import Path; from tests import bench_data as b;"
                f"b.measure(Path({str(path)!r}), Path({str(model)!r}), Path({str(cache)!r}), "
                f"{options.batches})"
            )
            command = [sys.executable, "-c", code]
            done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
            measured = json.loads(done.stdout.splitlines()[-1])
            result[f"{kind}_{name}"] = {"gib": path.stat().st_size / 2**30} | measured
            print(kind, name, measured, flush=True)
    options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
