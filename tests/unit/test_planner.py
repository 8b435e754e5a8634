"""Layouts that the planner finds are legal, fit, and load as they are written."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from model_providers import checks, memory
from model_providers.config import Recompute
from model_providers.memory import training_bytes
from model_providers.parallel import Layout
from model_providers.presets import PRESETS
from prism_megatron import cli
from prism_megatron.config import load as configuration
from prism_megatron.planner import search as planner
from prism_megatron.planner.command import SEQUENCES
from prism_megatron.planner.hardware import H100, H200, NVLINK
from prism_megatron.planner.search import Request, layouts, search
from prism_megatron.planner.step_time import Options, StepTime, Work, estimate
from prism_megatron.training.setup import layout_of

RECIPE = Path(__file__).resolve().parents[2] / "configs" / "prism"
STAGES = {"sft": "sft.yaml", "rlvr": "grpo.yaml", "align": "align.yaml"}


def request(model: str, gpus: int, **options: Any) -> Request:
    values = dict(
        config=PRESETS[model],
        gpu=H100,
        memory=76e9,
        sequence=8192,
        sequences=512,
        patches=4096,
    )
    return Request(model=model, gpus=gpus, **values | options)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("model", "gpus"), [("qwen3-vl-8b", 8), ("qwen3-vl-30b-a3b", 32)])
def test_what_is_found_is_legal_fits_and_is_in_order(model: str, gpus: int, stage: str) -> None:
    asked = request(model, gpus, stage=stage)
    found = search(asked).candidates
    assert found
    assert [one.rank for one in found] == sorted(one.rank for one in found)
    for one in found:
        checks.check_layout(asked.config, one.layout)
        need = training_bytes(
            asked.config,
            one.layout,
            gpus,
            tokens=one.row_tokens,
            patches=asked.patches * one.row_tokens / asked.sequence / one.layout.context,
            micro_batches=one.micro_batches,
            recompute=one.recompute,
            offload=one.offload,
        )
        assert need == one.memory
        assert need.peak(one.offload) <= one.peak <= asked.memory
        # every sequence has its place
        rows = one.row_tokens // asked.sequence * one.micro_batches * one.layout.data(gpus)
        assert rows >= asked.sequences
        assert one.fits
        assert (one.engine is None) == (stage == "sft")
        if one.engine:
            assert one.engine.tokens >= planner.LEAST_SEQUENCES * asked.sequence


def test_no_more_is_computed_again_than_must_be() -> None:
    asked = request("qwen3-vl-8b", 8)
    for one in search(asked).candidates:
        ladder = planner._ladder(asked.config, one.layout)
        place = ladder.index(one.recompute)
        peaks = [
            training_bytes(
                asked.config,
                one.layout,
                8,
                tokens=one.row_tokens,
                patches=4096 * one.row_tokens / 8192 / one.layout.context,
                micro_batches=one.micro_batches,
                recompute=step,
                offload=one.offload,
            ).activations
            for step in ladder
        ]
        assert peaks == sorted(peaks, reverse=True)
        assert place == 0 or peaks[place - 1] > peaks[place]


def test_more_memory_is_never_slower() -> None:
    small = search(request("qwen3-vl-32b", 32)).candidates[0]
    large = search(request("qwen3-vl-32b", 32, memory=134e9)).candidates[0]
    assert large.rank <= small.rank


def test_layouts_of_1024_gpus_are_few_enough() -> None:
    """Each takes about a millisecond."""
    config = PRESETS["qwen3-vl-235b-a22b"]
    found = list(layouts(config, 1024, 8192))
    assert 500 < len(found) < 5000
    assert len(set(found)) == len(found)
    assert Layout(tensor=2, pipeline=4, virtual_pipeline=2, expert=8, sequence_parallel=True,
                  embedding_as_layer=True, loss_as_layer=True) in found  # fmt: skip
    assert any(layout.first_stage_layers for layout in found)
    assert all(layout.tensor <= 8 for layout in found)


def test_an_engine_of_a_large_model_is_spread_over_a_host() -> None:
    asked = request("qwen3-vl-235b-a22b", 256, stage="rlvr", gpu=H200, memory=134e9)
    engine = search(asked).candidates[0].engine
    assert engine is not None
    assert engine.tensor == 8
    assert engine.weights == pytest.approx(2 * 235e9 / 8, rel=0.02)


@pytest.mark.parametrize("stage", STAGES)
def test_overlays_are_valid(stage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "--model", "qwen3-vl-8b", "--gpus", "16", "--gpu-memory", "80"]
    arguments += ["--seq", "10240", "--stage", stage, "--out", str(tmp_path), "--top", "2"]
    arguments += ["--vision", "replicated"]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "optimizer" in printed and "bubble" in printed and "NVLink" in printed
    files = sorted(tmp_path.glob("*.yaml"))
    assert [file.name for file in files] == [
        f"qwen3-vl-8b-16x80gb-{stage}-{i}.yaml" for i in (1, 2)
    ]
    model = "model" if stage == "sft" else "policy"
    batch: dict[str, Any] = dict(sequence=10240, sequences=SEQUENCES[stage])
    asked = request("qwen3-vl-8b", 16, stage=stage, vision="replicated", **batch)
    for file, planned in zip(files, search(asked).candidates, strict=False):
        # the recipe's overlay for 8B has a layout, of which nothing may be left
        base = [str(RECIPE / STAGES[stage]), str(RECIPE / "8b.yaml"), str(file)]
        run = [stage, "--dry-run", "--gpus", "16", f"{model}.path=Qwen3-VL-8B-Instruct"]
        run += [part for path in base for part in ("--config", path)]
        if stage == "align":
            run.append("discriminator.path=Qwen3-VL-2B-Instruct")
            run.append("discriminator.parallel.expert=1")
        assert cli.main(run) == 0, capsys.readouterr().err
        config: Any = configuration.load(stage, base, [])
        section = getattr(config, model)
        assert layout_of(section.parallel) == planned.layout
        assert Recompute(**section.recompute.model_dump()) == planned.recompute
        assert config.train.micro_batch_tokens == planned.row_tokens
        optimizer = config.optimizer if stage == "sft" else config.policy_optimizer
        assert optimizer.offload == planned.offload
        capsys.readouterr()


def test_what_does_not_fit_says_what_would(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "--model", "qwen3-vl-235b-a22b", "--gpus", "16", "--gpu-memory", "80"]
    assert cli.main([*arguments, "--seq", "16384"]) == 1
    printed = capsys.readouterr().out
    assert "does not fit 16 GPUs of 80 GB" in printed
    assert "32 GPUs are enough: " in printed


def test_offload_says_what_it_takes_of_a_host(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "--model", "qwen3-vl-32b", "--gpu-memory", "80", "--seq", "4096"]
    assert cli.main([*arguments, "--gpus", "8", "--top", "1"]) == 0
    # 12 bytes of each of 33.4e9 weights, and what the stages are uneven by
    [gigabytes] = re.findall(r"offload of (\d+) GB a host", capsys.readouterr().out)
    assert int(gigabytes) == pytest.approx(12 * 33.4, rel=0.05)


def test_several_requests_make_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "--model", "qwen3-vl-8b", "qwen3-vl-235b-a22b", "--gpus", "8", "16"]
    assert cli.main([*arguments, "--gpu-memory", "80", "--seq", "8192"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 4
    assert lines[2].startswith("| qwen3-vl-8b | 8 |")
    assert lines[4].startswith("| qwen3-vl-235b-a22b | 8 | does not fit |")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "qwen4"], "'qwen4' is neither a directory nor one of qwen3-vl-2b"),
        (["--gpu-memory", "40"], "--gpu-memory 40: no GPU of that size is known"),
        (["--gpus", "12"], "--gpus 12: hosts have 8 GPUs each"),
        (["--patches", "40000"], "--patches 40000 make 10000 tokens of an image"),
        (["--top", "0"], "--top 0 must be 1 or more"),
    ],
)
def test_mistakes_are_named(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    good = ["--model", "qwen3-vl-8b", "--gpus", "8", "--gpu-memory", "80", "--seq", "8192"]
    assert cli.main(["plan", *good, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_directory_is_a_model_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import json

    from model_providers.presets import hf_config

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text(json.dumps(hf_config("qwen3-vl-2b")))
    arguments = ["plan", "--model", str(tmp_path / "mine"), "--gpus", "2", "--gpu-memory", "141"]
    assert cli.main([*arguments, "--seq", "4096", "--fp8", "blockwise"]) == 0
    assert "mine, 2 GPUs of 141 GB" in capsys.readouterr().out


def test_a_replicated_tower_sends_features_alone_and_encodes_whole_images() -> None:
    config, sharded = PRESETS["qwen3-vl-8b"], Layout(tensor=4, sequence_parallel=True)
    replicated = replace(sharded, vision="replicated")

    def time(layout: Layout, images: int) -> StepTime:
        """One micro-batch of 8 rows on each of two data-parallel ranks."""
        work = Work(2 * 8 * 8192, 2 * 8 * 8192**2, 2 * images, 4096, 1)
        return estimate(config, layout, 8, work, H200, Options())

    many, few = 8, 1
    assert time(replicated, many).tensor < time(sharded, many).tensor
    assert time(replicated, many).products == pytest.approx(time(sharded, many).products)
    # gradients of all four towers of a tensor-parallel group are summed
    tower = memory.parameters(config).vision + memory.parameters(config).mergers
    summed = 2 * 3 / 4 * memory.GRADIENT * tower / NVLINK
    assert time(replicated, many).update > time(sharded, many).update + summed
    # three ranks of four have nothing to do
    more = time(replicated, few).products - time(replicated, 0).products
    assert more == pytest.approx(4 * (time(sharded, few).products - time(sharded, 0).products))


def test_a_replicated_tower_is_planned_where_it_makes_a_difference() -> None:
    asked = request("qwen3-vl-8b", 8, vision="replicated", memory=134e9)
    found = search(asked).candidates
    assert {one.layout.tensor for one in found} >= {1, 2}
    for one in found:
        assert one.layout.vision == ("replicated" if one.layout.tensor > 1 else "sharded")


def test_fp8_is_faster() -> None:
    asked = request("qwen3-vl-8b", 8, gpu=H200, memory=134e9)
    fp8 = search(replace(asked, fp8="tensorwise")).candidates[0]
    assert fp8.time.total < 0.95 * search(asked).candidates[0].time.total
    assert fp8.memory.fp8 > 0
    held = replace(fp8, request=replace(fp8.request, fp8_param_gather=True))
    assert held.peak < fp8.peak
    assert held.time.update < fp8.time.update
