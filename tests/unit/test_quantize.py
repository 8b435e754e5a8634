"""Quantised checkpoints: what the formats hold, what stays as it was, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import product
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from checkpoint_tools import hf_writer, quantize
from checkpoint_tools.headers import SINGLE
from checkpoint_tools.hf_directory import HFDirectory, SafetensorsDirectory
from checkpoint_tools.quantize import dequantized
from checkpoint_tools.upcycle import upcycle
from model_providers.fp8_blocks import quantize_blocks
from prism_megatron.config import schema
from prism_megatron.data import digit_sums
from prism_megatron.pipelines import tiny_model
from tests import tiny_models

ROOT = Path(__file__).resolve().parents[2]
SYSTEM_PROMPT = ROOT / "configs/quickstart/system_prompt.txt"
LAYER = "model.language_model.layers.1."


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions about images, and a processor's files."""
    out = tmp_path_factory.mktemp("data")
    digit_sums.build(schema.DigitSums(out=out, train_rows=6, heldout_rows=2))
    tiny_model.run(
        schema.TinyModel(out=out / "tiny", data=out / "sft.json", system_prompt=SYSTEM_PROMPT)
    )
    return out


@pytest.fixture(scope="module")
def models(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        kind: tiny_models.save_served(root / kind, data / "tiny", kind) for kind in ("dense", "moe")
    }


def test_a_block_is_scaled_by_its_largest_number() -> None:
    weight = torch.randn(256, 384) * torch.logspace(-3, 2, 384)
    weight[128:, :128] = 0
    # whose largest number over 448 is no normal one
    weight[128:, 128:256] = torch.randn(128, 128) * 1e-38
    quantised, scale = quantize_blocks(weight)
    assert quantised.dtype is torch.float8_e4m3fn and quantised.shape == weight.shape
    assert scale.shape == (2, 3) and scale.dtype is torch.float32
    assert scale[0, 1] == weight[:128, 128:256].abs().max() / 448
    found = quantised.float() * scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
    # three bits of mantissa, and a smallest step where a number is far below the block's largest
    step = scale.repeat_interleave(128, 0).repeat_interleave(128, 1) * 2**-9
    assert ((found - weight).abs() <= weight.abs() * 2**-4 + step / 2).all()
    assert (found[128:, :256] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("magnitude", [1e-30, 1e-3, 1.0, 3e4])
def test_blocks_are_rounded_to_the_bits_of_the_definition(
    dtype: torch.dtype, magnitude: float
) -> None:
    weight = (torch.randn(256, 384) * magnitude).to(dtype)
    quantised, scale = quantize_blocks(weight)
    for row, column in product(range(2), range(3)):
        place = slice(128 * row, 128 * row + 128), slice(128 * column, 128 * column + 128)
        block = weight[place].float()
        assert scale[row, column] == block.abs().max() / torch.tensor(448.0)
        wanted = (block / scale[row, column]).clamp(-448, 448).to(torch.float8_e4m3fn)
        assert torch.equal(quantised[place].view(torch.uint8), wanted.view(torch.uint8))


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_fp8_blocks_are_written_as_engines_read_them(
    models: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    out = tmp_path / "out"
    errors = quantize.quantize(models[kind], out, "fp8-block")
    source, written = HFDirectory(models[kind]), SafetensorsDirectory(out)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "fp8" and config["weight_block_size"] == [128, 128]
    kept = set(config["modules_to_not_convert"])
    assert {"lm_head", "model.visual.blocks.0.attn.qkv", "model.visual.merger.linear_fc1"} <= kept
    assert (LAYER + "mlp.gate" in kept) == (kind == "moe")
    assert not any("proj" in name and "visual" not in name for name in kept)
    experts = [f"mlp.experts.{i}." for i in range(6)] if kind == "moe" else ["mlp."]
    for expert in experts:
        for part, shape in (("gate_proj", 2), ("up_proj", 2), ("down_proj", 2)):
            name = f"{LAYER}{expert}{part}.weight"
            assert written[name].dtype is torch.float8_e4m3fn and written[name].dim() == shape
            assert written[name + "_scale_inv"].dtype is torch.float32
    if kind == "moe":
        fused = source[LAYER + "mlp.experts.gate_up_proj"][2].float()
        halves = [
            dequantized(written, f"{LAYER}mlp.experts.2.{p}.weight")
            for p in ("gate_proj", "up_proj")
        ]
        assert torch.cat(halves).sub(fused).norm() < 0.04 * fused.norm()
        assert not any("gate_up_proj" in name for name in written)
    assert len(errors) == 2 * (4 + 3 * len(experts))
    assert all(0.01 < error < 0.04 for error in errors.values())
    assert torch.equal(written["lm_head.weight"], source["lm_head.weight"])


def test_a_discriminator_keeps_its_head_and_router(models: dict[str, Path], tmp_path: Path) -> None:
    upcycle(models["dense"], tmp_path / "judge", 4, 2, 0.01, 0.02, 5)
    quantize.quantize(tmp_path / "judge", tmp_path / "out", "fp8-block")
    source, written = HFDirectory(tmp_path / "judge"), SafetensorsDirectory(tmp_path / "out")
    for name in ("v_head.1.weight", LAYER + "mlp.gate.weight"):
        assert torch.equal(written[name], source[name])
        assert written[name].dtype == source[name].dtype


@pytest.mark.parametrize("kind, form", [("dense", "nvfp4"), ("moe", "fp8")])
def test_modelopt_calibrates_with_images(
    models: dict[str, Path], data: Path, tmp_path: Path, kind: str, form: str
) -> None:
    out = tmp_path / "out"
    tool = [sys.executable, "-m", "checkpoint_tools.quantize", "--format", form]
    paths = ["--hf", str(models[kind]), "--out", str(out)]
    calibration = ["--calibration", str(data / "prompts.parquet"), "--samples", "4"]
    done = subprocess.run(
        [*tool, *paths, *calibration], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "relative error by layer" in done.stdout
    written, source = SafetensorsDirectory(out), HFDirectory(models[kind])
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "modelopt"
    # vLLM reads there whether embeddings are tied
    assert config["text_config"]["tie_word_embeddings"] is False
    assert config["text_config"] == hf_writer.in_dialect(source.raw_config, "4.57")["text_config"]
    kept_as_is = config["quantization_config"]["ignore"]
    for module in ("lm_head", "model.visual"):
        assert any(pattern.startswith(module) for pattern in kept_as_is), kept_as_is
    name = LAYER + ("mlp.experts.1.up_proj.weight" if kind == "moe" else "mlp.up_proj.weight")
    assert written[name].dtype is (torch.uint8 if form == "nvfp4" else torch.float8_e4m3fn)
    # what came in, seen with images
    assert written[name.replace("weight", "input_scale")].item() > 0
    for kept in ("lm_head.weight", "model.visual.blocks.1.attn.qkv.weight"):
        assert torch.equal(written[kept], source[kept])
    errors = json.loads((out / quantize.REPORT).read_text())["relative_error"]
    worst = max(errors.values())
    assert (0.01 < worst < 0.05) if form == "fp8" else (0.05 < worst < 0.2)
    assert (out / "tokenizer.json").exists() and not (out / "job.json").exists()


def test_what_cannot_be_quantised_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    odd = tiny_models.save(tmp_path / "odd", "dense")
    with pytest.raises(ValueError, match=r"down_proj.weight with shape \(56, 112\) can't"):
        quantize.quantize(odd, tmp_path / "out", "fp8-block")
    with pytest.raises(ValueError, match="fp8 scales activations by what they were; give"):
        quantize.quantize(models["dense"], tmp_path / "out", "fp8")
    again = tmp_path / "again"
    quantize.quantize(models["dense"], again, "fp8-block")
    with pytest.raises(ValueError, match="is F8_E4M3; weights in BF16, F16, F32 can be read"):
        quantize.quantize(again, tmp_path / "twice", "fp8-block")
    assert not (tmp_path / "out").exists() and not (tmp_path / "twice").exists()


def test_an_error_that_rounding_does_not_explain_stops_it(
    models: dict[str, Path], tmp_path: Path
) -> None:
    def wrong(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        quantised, scale = quantize_blocks(weight)
        return quantised, scale * 1.1

    with mock.patch.object(quantize, "quantize_blocks", wrong):
        with pytest.raises(ValueError, match="further from the source than rounding to fp8-block"):
            quantize.quantize(models["dense"], tmp_path / "out", "fp8-block")
    assert not (tmp_path / "out").exists()


def test_a_value_that_should_not_change_is_noticed(models: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    quantize.quantize(models["dense"], out, "fp8-block")
    weights = load_file(out / SINGLE)
    weights["model.visual.pos_embed.weight"][0, 0] += 1
    (out / SINGLE).unlink()
    hf_writer.save_file(weights, out / SINGLE)
    with pytest.raises(ValueError, match="pos_embed.weight should be as it was"):
        quantize._errors(HFDirectory(models["dense"]), SafetensorsDirectory(out))
