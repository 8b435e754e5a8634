"""Memory and time of the conversions, with random weights of a released model's shape.

    python tests/bench_checkpoint_tools.py --model qwen3-vl-8b --layers 36 --dir DIR --json FILE

Each step is a process of its own, whose peak resident memory the kernel reports. The bound is what
the tools promise, twice the largest layer (of the decoder, or the embedding) and 2 GiB; speed is
set against copying the same bytes from and to the same disk. What a step reads is dropped from the
page cache before it where that is allowed (root), so that the disk is measured.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from checkpoint_tools import hf_writer
from checkpoint_tools.megatron_weights import Structure
from checkpoint_tools.weights import StoredWeights
from model_providers import presets
from model_providers.architecture import Qwen3VLConfig

ROOT = Path(__file__).resolve().parents[1]


class RandomWeights(StoredWeights):
    """Weights of that shape in BF16; all from one block of random numbers, which is not what a
    conversion depends on."""

    def __init__(self, config: Qwen3VLConfig) -> None:
        self.structure = Structure(config, "language")
        self.block = torch.randn(2**22).bfloat16()

    def __iter__(self) -> Iterator[str]:
        return iter(self.structure.by_name)

    def __len__(self) -> int:
        return len(self.structure.by_name)

    def like(self, name: str) -> Tensor:
        return self.structure.like(name).to(torch.bfloat16)

    def __getitem__(self, name: str) -> Tensor:
        return self._of_shape(self.like(name).shape)

    def expert(self, name: str, index: int) -> Tensor:
        return self._of_shape(self.like(name).shape[1:])

    def _of_shape(self, shape: torch.Size) -> Tensor:
        repeats = -(-shape.numel() // self.block.numel())
        return self.block.repeat(repeats)[: shape.numel()].reshape(shape)

    def file_of(self, name: str) -> Path:
        return Path("random")


def main() -> None:
    """Make the source, then time copy, conversion and export."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, choices=sorted(presets.PRESETS))
    parser.add_argument("--layers", type=int, required=True)
    parser.add_argument("--ranks", type=int, default=1, help="processes that share the work")
    parser.add_argument("--dir", type=Path, required=True, help="scratch folder")
    parser.add_argument("--json", type=Path, help="file that gets this result as a line")
    options = parser.parse_args()
    options.dir.mkdir(parents=True)
    source, ckpt, copy, hf = (options.dir / name for name in ("source", "ckpt", "copy", "hf"))
    result = _make(options.model, options.layers, source)
    result["copy"] = _measure(["cp", "-r", str(source), str(copy)], source, sync=copy)
    shutil.rmtree(copy)
    tool = [sys.executable, "-m"]
    if options.ranks > 1:
        tool += ["torch.distributed.run", "--standalone", f"--nproc-per-node={options.ranks}", "-m"]
    result["ranks"] = options.ranks
    convert = [*tool, "checkpoint_tools.hf_to_megatron", "--hf", str(source), "--out", str(ckpt)]
    result["hf_to_megatron"] = _measure([*convert, "--no-verify"], source)
    shutil.rmtree(ckpt)
    result["hf_to_megatron_verified"] = _measure(convert, source)
    shutil.rmtree(source)
    export = [*tool, "checkpoint_tools.megatron_to_hf", "--ckpt", str(ckpt), "--out", str(hf)]
    result["megatron_to_hf"] = _measure([*export, "--no-verify"], ckpt)
    shutil.rmtree(hf)
    result["megatron_to_hf_verified"] = _measure(export, ckpt)
    shutil.rmtree(options.dir)
    _print(result)
    if options.json:
        with options.json.open("a") as file:
            file.write(json.dumps(result) + "\n")


def _make(model: str, layers: int, out: Path) -> dict[str, Any]:
    """Write the source in a process of its own, so that its memory is not measured with ours."""
    code = (
        "import sys; from pathlib import Path; from tests import bench_checkpoint_tools as b;"
        f"b.write_source({model!r}, {layers}, Path({str(out)!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
    sizes: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
         if line.startswith("model name")), platform.processor())  # fmt: skip
    packages = ("torch", "megatron-core", "safetensors", "transformers")
    return {
        "model": model,
        "layers": layers,
        **sizes,
        "bound_gib": 2 * sizes["largest_layer_gib"] + 2,
        "machine": f"{os.cpu_count()} x {cpu}",
        "versions": {package: version(package) for package in packages},
    }


def write_source(model: str, layers: int, out: Path) -> None:
    """A Hugging Face directory of that shape and depth; prints its sizes."""
    raw = presets.hf_config(model)
    raw["text_config"]["num_hidden_layers"] = layers
    config_from = out.with_name("config")
    config_from.mkdir()
    (config_from / "config.json").write_text(json.dumps(raw))
    weights = RandomWeights(Qwen3VLConfig.from_hf(config_from))
    hf_writer.export(out, weights, config_from, {"from": {}}, verify=False)
    sizes = {name: weights.like(name).nbytes / 2**30 for name in weights}
    decoder = sum(v for k, v in sizes.items() if k.startswith("model.language_model.layers.0."))
    embedding = sizes["model.language_model.embed_tokens.weight"]
    largest = max(decoder, embedding)
    print(json.dumps({"gib": sum(sizes.values()), "largest_layer_gib": largest}))
    shutil.rmtree(config_from)


def _measure(command: list[str], reads: Path, sync: Path | None = None) -> dict[str, float]:
    """Seconds, GiB/s of the source's bytes, and peak resident memory of the process in GiB."""
    nbytes = sum(file.stat().st_size for file in reads.rglob("*") if file.is_file())
    os.sync()
    if os.geteuid() == 0:
        Path("/proc/sys/vm/drop_caches").write_text("1")
    start = time.monotonic()
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    # a copy is not done while its bytes are only in memory; the tools sync what they write
    if sync is not None:
        os.sync()
    seconds = time.monotonic() - start
    if status:
        raise RuntimeError(f"{' '.join(command)} ended with status {status}")
    measured = {
        "seconds": round(seconds, 1),
        "gib_per_s": round(nbytes / 2**30 / seconds, 3),
    }
    # until it runs another program, a process has its parent's memory
    return measured if sync is not None else measured | {"peak_rss_gib": usage.ru_maxrss / 2**20}


def _print(result: dict[str, Any]) -> None:
    title = (
        f"{result['model']}, {result['layers']} layers, {result['gib']:.1f} GiB, "
        f"{result['ranks']} ranks, "
        f"{result['machine']}; bound {result['bound_gib']:.2f} GiB"
    )
    table = Table(title=title)
    for column in ("step", "s", "GiB/s", "of copying", "peak RSS, GiB"):
        table.add_column(column)
    speed = result["copy"]["gib_per_s"]
    for step in ("copy", "hf_to_megatron", "hf_to_megatron_verified", "megatron_to_hf",
                 "megatron_to_hf_verified"):  # fmt: skip
        row = result[step]
        share = f"{row['gib_per_s'] / speed:.0%}"
        table.add_row(step, f"{row['seconds']:.1f}", f"{row['gib_per_s']:.2f}", share,
                      f"{row.get('peak_rss_gib', math.nan):.2f}")  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    main()
