"""Quantise an exported model for rollouts and serving, in layouts that engines load.

    prism-megatron checkpoint quantize --hf runs/rlvr/hf --out fp8 --format fp8-block
    prism-megatron checkpoint quantize --hf runs/rlvr/hf --out fp8 --format fp8 \\
        --calibration data/prompts.parquet --backend cuda

    format     weights                            activations           made by
    fp8-block  FP8 in blocks of 128 x 128         FP8, scaled as run    this file, tensor by tensor
    fp8        FP8, one scale a matrix            FP8, calibrated       NVIDIA ModelOpt, in memory
    nvfp4      FP4 in blocks of 16                FP4, calibrated       NVIDIA ModelOpt, in memory

fp8-block is the layout of DeepSeek-V3 (W = q * weight_scale_inv for each block). Only the decoder's
projections and experts are quantised; embedding, norms, router, vision tower, lm_head and value
heads stay as they are. Calibration runs prompts with their images through the model. What was
written is read back, set against the source, and listed layer by layer; quantization.json in the
result has every matrix.
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from pyarrow import parquet
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from checkpoint_tools import hf_writer, hub, world
from checkpoint_tools.command import exit_status
from checkpoint_tools.files import (
    identity,
    new_folder,
    prepare_staging,
    publish,
    write_atomically,
)
from checkpoint_tools.hf_directory import HFDirectory, SafetensorsDirectory
from checkpoint_tools.images import decode_image
from checkpoint_tools.megatron_weights import structure_of
from checkpoint_tools.weights import StoredWeights
from model_providers import backend as backends
from model_providers.fp8_blocks import (
    BLOCK,
    PROJECTION,
    SCALE,
    projections,
    quantization_config,
    quantize_blocks,
)
from model_providers.weight_map import unused_names

Format = Literal["fp8-block", "fp8", "nvfp4"]
FORMATS: tuple[Format, ...] = ("fp8-block", "fp8", "nvfp4")
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""e2m1 by its lower three bits; the fourth is the sign."""
WORST = {"fp8-block": 0.05, "fp8": 0.05, "nvfp4": 0.2}
"""Largest root mean square error of a matrix, relative to its own, that rounding explains."""
REPORT = "quantization.json"
SCALES = re.compile(r".*\.(weight_scale(_inv|_2)?|input_scale)")


def quantize(
    hf: Path,
    out: Path,
    form: Format,
    calibration: Path | None = None,
    samples: int = 128,
    backend: str = "cpu",
) -> dict[str, float]:
    """Write `out` from the Hugging Face directory `hf`; the relative error of every matrix. For
    fp8-block all ranks of the world call this and share the work.

    calibration: parquet with the columns prompt and images, of which `samples` rows are run on the
    backend's device.

    Raises:
        ValueError: a matrix that can't be cut into blocks, no calibration data, or an error that
            rounding does not explain.
    """
    source = HFDirectory(hf)
    if form == "fp8-block":
        _write_blocks(source, out)
    else:
        if calibration is None:
            raise ValueError(f"{form} scales activations by what they were; give --calibration")
        device = backends.create(backend).device
        _write_modelopt(source, out, form, calibration, samples, device)
    errors: dict[str, float] = json.loads((out / REPORT).read_text())["relative_error"]
    return errors


def _write_blocks(source: HFDirectory, out: Path) -> None:
    weights = _Blocks(source)
    made = quantization_config((name, weights.like(name)) for name in weights)
    marked = source.raw_config | {"quantization_config": made}
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder)
        hf_writer.copy_config(source.path, files)
        (files / "config.json").write_text(json.dumps(marked, indent=2))
        job = {"from": identity(source.path), "format": "fp8-block"}

        def check(staging: Path) -> None:
            written = SafetensorsDirectory(staging)
            errors = world.merged(_errors(source, written))
            world.first(lambda: _report(staging, "fp8-block", errors))

        hf_writer.export(out, weights, files, job, directory=SafetensorsDirectory, check=check)


class _Blocks(StoredWeights):
    """The source with FP8 projections and their scales; experts one by one, as engines read
    quantised ones."""

    def __init__(self, source: HFDirectory) -> None:
        self.source = source
        self.names = [name for stored in source for name in _quantised_names(source, stored)]
        self._last: tuple[str, Tensor, Tensor] | None = None
        for name in self.names:
            if PROJECTION.fullmatch(name) and any(size % BLOCK for size in self.like(name).shape):
                raise ValueError(
                    f"{source.file_of(_stored_name(name))}: {name} with shape "
                    f"{tuple(self.like(name).shape)} can't be cut into blocks of {BLOCK}, which "
                    "engines need; choose another format"
                )

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def file_of(self, name: str) -> Path:
        return self.source.file_of(_stored_name(name.removesuffix(SCALE)))

    def like(self, name: str) -> Tensor:
        base = name.removesuffix(SCALE)
        if not PROJECTION.fullmatch(base):
            return self.source.like(name)
        rows, columns = _original_shape(self.source, base)
        if name.endswith(SCALE):
            return torch.empty(-(-rows // BLOCK), -(-columns // BLOCK), device="meta")
        return torch.empty(rows, columns, dtype=torch.float8_e4m3fn, device="meta")

    def expert(self, name: str, index: int) -> Tensor:
        raise AssertionError(f"{name} is not fused")

    def __getitem__(self, name: str) -> Tensor:
        base = name.removesuffix(SCALE)
        if not PROJECTION.fullmatch(base):
            return self.source[name]
        # a matrix and its scales are asked for one after the other
        if self._last is None or self._last[0] != base:
            self._last = (base, *quantize_blocks(_original(self.source, base)))
        return self._last[2 if name.endswith(SCALE) else 1]


def _quantised_names(source: HFDirectory, stored: str) -> Iterator[str]:
    """What becomes of a stored tensor."""
    names = projections(stored, source.config.num_experts)
    yield from (with_scale for name in names for with_scale in (name, name + SCALE))
    if not names:
        yield stored


def _stored_name(name: str) -> str:
    """The tensor of the source that a projection lies in."""
    prefix, found, rest = name.partition(".experts.")
    if not found or "." not in rest:
        return name
    part = rest.split(".")[1]
    return f"{prefix}.experts.{'down_proj' if part == 'down_proj' else 'gate_up_proj'}"


def _original(source: HFDirectory, name: str) -> Tensor:
    """A projection as the source has it."""
    stored = _stored_name(name)
    if stored == name:
        return source[name]
    index, part = name.partition(".experts.")[2].split(".")[:2]
    tensor = source.expert(stored, int(index))
    return tensor if part == "down_proj" else tensor.chunk(2)[part == "up_proj"]


def _original_shape(source: HFDirectory, name: str) -> tuple[int, int]:
    stored = _stored_name(name)
    rows, columns = source.like(stored).shape[-2:]
    return (rows // 2 if stored.endswith("gate_up_proj") else rows), columns


def _errors(source: HFDirectory, written: SafetensorsDirectory) -> dict[str, float]:
    """Relative root mean square error of every quantised matrix, this rank's share of them.

    Raises ValueError if a tensor is missing, surplus, or should be as it was and is not.
    """
    wanted = {
        name
        for stored in source
        for name in _quantised_names(source, stored)
        if not name.endswith(SCALE)
    }
    found = {name for name in written if not SCALES.fullmatch(name)}
    if wrong := sorted((found ^ wanted) - unused_names(source.config, "language")):
        raise ValueError(f"{written.path}: {len(wrong)} names are not as expected: {wrong[:5]}")
    rank, size = world.rank_and_size()
    errors = {}
    names = sorted(wanted & found)[rank::size]
    for name in track(names, "comparing", disable=rank > 0, transient=True):
        if not PROJECTION.fullmatch(name):
            if not torch.equal(written[name], source[name]):
                raise ValueError(f"{written.file_of(name)}: {name} should be as it was and is not")
            continue
        original = _original(source, name).float()
        difference = dequantized(written, name) - original
        errors[name] = float(difference.norm() / original.norm().clamp(min=1e-30))
    return errors


def dequantized(written: SafetensorsDirectory, name: str) -> Tensor:
    """fp32 [rows, columns] of a quantised matrix of any of the formats.

    Raises ValueError if it is not quantised.
    """
    weight = written[name]
    if weight.dtype == torch.uint8:
        # two numbers a byte, the lower four bits first
        values = torch.tensor([*FP4_VALUES, *(-value for value in FP4_VALUES)])
        unpacked = torch.stack([weight & 15, weight >> 4], -1).flatten(-2)
        scale = written[f"{name}_scale"].float() * written[f"{name}_scale_2"].float()
        return values[unpacked.long()] * scale.repeat_interleave(16, -1)
    if weight.dtype != torch.float8_e4m3fn:
        raise ValueError(f"{written.file_of(name)}: {name} is {weight.dtype}, not quantised")
    if name + SCALE in written:
        scale = written[name + SCALE]
        blocks = scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
        return weight.float() * blocks
    return weight.float() * written[f"{name}_scale"].float()


def _report(directory: Path, form: Format, errors: dict[str, float]) -> None:
    """Write quantization.json; ValueError if an error is beyond rounding."""
    if bad := {name: error for name, error in errors.items() if not error <= WORST[form]}:
        name = max(bad, key=lambda key: bad[key])
        raise ValueError(
            f"{len(bad)} matrices are further from the source than rounding to {form} explains: "
            f"{name} by {bad[name]:.3f} of its size, at most {WORST[form]}"
        )
    report = {"format": form, "relative_error": dict(sorted(errors.items()))}
    write_atomically(directory / REPORT, json.dumps(report, indent=2))


def _write_modelopt(
    source: HFDirectory,
    out: Path,
    form: Format,
    calibration: Path,
    samples: int,
    device: torch.device,
) -> None:
    try:
        import modelopt.torch.quantization as mtq
        from modelopt.torch.export import export_hf_checkpoint
    except ImportError as error:
        raise ValueError(
            f"{form} needs nvidia-modelopt and accelerate (pip install 'prism-megatron[quantize]'):"
            f" {error}"
        ) from error
    if source.config.dedicated:
        raise ValueError(f"{source.path}: no engine runs a dedicated discriminator; use fp8-block")
    processor = AutoProcessor.from_pretrained(source.path)
    model = AutoModelForImageTextToText.from_pretrained(source.path, dtype="auto").to(device)
    settings: dict[str, Any] = copy.deepcopy(
        {"fp8": mtq.FP8_DEFAULT_CFG, "nvfp4": mtq.NVFP4_DEFAULT_CFG}[form]
    )
    # ModelOpt leaves out router, lm_head and vision tower, but a convolution that was ever given
    # FP4 settings runs in a kernel for it (quant_conv.py)
    for entry in settings["quant_cfg"]:
        if entry.get("cfg") and entry["quantizer_name"].startswith("*"):
            entry["quantizer_name"] = "*language_model" + entry["quantizer_name"]

    @torch.no_grad()
    def run(quantised: Any) -> None:
        for inputs in _prompts(calibration, processor, samples):
            quantised(**inputs.to(device))

    mtq.quantize(model, settings, run)
    staging = prepare_staging(
        out, {"from": identity(source.path), "format": form}, sum(
            source.like(name).nbytes for name in source
        )
    )  # fmt: skip
    heads = {name: source[name] for name in source.config.value_heads if name in source}
    export_hf_checkpoint(model, export_dir=staging, extra_state_dict=heads)
    quantization = json.loads((staging / "config.json").read_text())["quantization_config"]
    hf_writer.copy_config(source.path, staging)
    marked = source.raw_config | {"quantization_config": quantization}
    config = hf_writer.in_dialect(marked, "4.57")
    write_atomically(staging / "config.json", json.dumps(config, indent=2))
    _report(staging, form, _errors(source, SafetensorsDirectory(staging)))
    publish(staging, out)


def _prompts(file: Path, processor: Any, count: int) -> Iterator[Any]:
    """The first rows' prompts as the model takes them, with their images."""
    table = parquet.read_table(file, columns=["prompt", "images"]).slice(0, count)
    if not len(table):
        raise ValueError(f"{file} has no rows to calibrate with")
    for row in track(table.to_pylist(), "calibrating", transient=True):
        images = [_image(value, file.parent) for value in row["images"] or ()]
        messages = [
            {"role": message["role"], "content": _content(message["content"])}
            for message in row["prompt"]
        ]
        text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        yield processor(text=[text], images=images or None, return_tensors="pt")


def _image(value: Any, folder: Path) -> Image.Image:
    """From bytes, a path, or a dictionary of either, as data sets have them."""
    if isinstance(value, dict):
        value = value.get("bytes") or value["path"]
    return decode_image(value if isinstance(value, bytes) else (folder / value).read_bytes())


def _content(text: str) -> list[dict[str, str]]:
    """`<image>` in a row's text stands for its next image."""
    parts: list[dict[str, str]] = []
    for i, piece in enumerate(text.split("<image>")):
        parts += [{"type": "image"}] if i else []
        parts += [{"type": "text", "text": piece}] if piece else []
    return parts


def _table(errors: dict[str, float]) -> Table:
    table = Table(title="relative error by layer")
    for column in ("layer", "matrices", "mean", "largest"):
        table.add_column(column)
    layers: dict[int, list[float]] = {}
    for name, error in errors.items():
        layers.setdefault(int(name.split(".")[3]), []).append(error)
    for layer, found in sorted(layers.items()):
        mean = sum(found) / len(found)
        table.add_row(str(layer), str(len(found)), f"{mean:.4f}", f"{max(found):.4f}")
    return table


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the top of the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hf", required=True, help="Hugging Face directory or hub id")
    parser.add_argument("--out", type=new_folder, required=True, help="directory to write")
    parser.add_argument("--format", required=True, choices=FORMATS)
    parser.add_argument("--calibration", type=Path, help="parquet with prompt and images")
    parser.add_argument(
        "--backend", default="cpu", choices=("cpu", "cuda"), help="where calibration runs"
    )
    parser.add_argument("--samples", type=int, default=128, help="rows of it to run")
    options = parser.parse_args(argv)
    world.join()
    source = hub.local(options.hf)
    structure_of(HFDirectory(source))
    calibration = (options.calibration, options.samples, options.backend)
    errors = quantize(source, options.out, options.format, *calibration)
    if world.rank_and_size()[0] == 0:
        Console().print(_table(errors))
    return 0


if __name__ == "__main__":
    raise SystemExit(exit_status(main))
