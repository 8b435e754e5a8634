"""The checkpoint tools as people run them: the examples of their help, under torchrun, on half a
model, and on shapes that are easily mistaken."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from torch import Tensor

from checkpoint_tools import hf_to_megatron, megatron_to_hf, reshard, verify
from checkpoint_tools.headers import SINGLE
from checkpoint_tools.hf_directory import HFDirectory
from model_providers.parallel import Layout
from tests import tiny_models
from tests.dist import test_checkpoint_tools as tools
from tests.dist.ranks import Ranks

Worlds = Callable[[int], Ranks]
ROOT = Path(__file__).resolve().parents[2]


def test_verify_sees_one_square_expert_that_is_turned(ranks: Worlds, tmp_path: Path) -> None:
    with mock.patch.dict(tiny_models.EXPERTS, {"moe_intermediate_size": 28}):
        source = tiny_models.save(tmp_path / "source", "moe")
    name = "model.language_model.layers.1.mlp.experts.gate_up_proj"

    def turn(weights: dict[str, Tensor]) -> None:
        assert weights[name].shape == (4, 56, 56)
        weights[name][2] = weights[name][2].T.clone()

    ranks(1).run(hf_to_megatron.convert, source, tmp_path / "ckpt")
    [report] = ranks(1).run(verify.verify, source, tmp_path / "ckpt")
    assert not report["differences"] and report["logits"] is not None
    turned = tools._damaged(source, tmp_path / "turned", turn)
    [report] = ranks(1).run(verify.verify, turned, tmp_path / "ckpt")
    [found] = report["differences"]
    assert (found["name"], found["detail"]) == (name, "experts [2] have other values")
    # an export would be read one way by some and the other way by others
    [message] = ranks(1).run(
        tools._refusal, megatron_to_hf.export, tmp_path / "ckpt", tmp_path / "hf"
    )
    assert "is square (4, 56, 56)" in message


@pytest.mark.parametrize("tied", [False, True])
def test_tokens_that_were_added_survive_every_padding(
    ranks: Worlds, tmp_path: Path, tied: bool
) -> None:
    """209 rows, which 2, 3 and 4 ranks share out with other paddings."""
    heads = {"num_attention_heads": 12, "num_key_value_heads": 12, "intermediate_size": 120}
    with (
        mock.patch.dict(tiny_models.TEXT, heads),
        mock.patch.dict(tiny_models.VISION, {"num_heads": 12}),
    ):
        model: Any = tiny_models.build("dense", tied=tied)
    model.resize_token_embeddings(tiny_models.VOCAB + 6)
    model.save_pretrained(tmp_path / "hf")
    ranks(1).run(hf_to_megatron.convert, tmp_path / "hf", tmp_path / "ckpt-1")
    for before, after in ((1, 4), (4, 3), (3, 2)):
        layout = Layout(tensor=after, sequence_parallel=True)
        source, out = tmp_path / f"ckpt-{before}", tmp_path / f"ckpt-{after}"
        ranks(1).run(reshard.reshard, source, out, layout)
        ranks(1).run(megatron_to_hf.export, out, tmp_path / f"hf-{after}")
        tools._equal(tmp_path / "hf", tmp_path / f"hf-{after}")
        assert HFDirectory(tmp_path / f"hf-{after}").config.vocab_size == 209


def test_the_examples_of_help_run(
    ranks: Worlds, hf_models: dict[str, Path], tmp_path: Path
) -> None:
    """One after the other, with models in the places that they name."""
    for place in ("Qwen/Qwen3-VL-4B-Instruct", "Qwen/Qwen3-VL-32B-Instruct", "runs/sft/hf"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).symlink_to(hf_models["dense"])
    for place in ("runs/a/hf", "runs/b/hf", "sft/hf", "rlvr/hf"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).symlink_to(hf_models["tied"])
    step = tmp_path / "runs/sft/checkpoints/step_000400"
    ranks(1).run(hf_to_megatron.convert, hf_models["dense"], step / "model")
    ran = ranks(1).run(_run_examples, tmp_path)[0]
    assert ran == [0] * 9
    made = ("ckpt/qwen3vl-4b", "ckpt/qwen3vl-32b", "hf", "tp8", "soup", "between")
    assert all((tmp_path / name).is_dir() for name in (*made, "runs/discriminator"))


def _run_examples(folder: Path) -> list[int]:
    before, ran = Path.cwd(), []
    os.chdir(folder)
    try:
        for tool in EXAMPLES:
            text = importlib.import_module(f"checkpoint_tools.{tool}").__doc__ or ""
            for line in re.findall(r"^    (?:prism|torchrun).*", text.replace("\\\n", ""), re.M):
                words = shlex.split(line)
                name = next(i for i, word in enumerate(words) if tool in word.replace("-", "_"))
                # a tiny model has two heads of keys
                arguments = ["2" if word == "8" else word for word in words[name + 1 :]]
                ran.append(_main(tool)(arguments))
    finally:
        os.chdir(before)
    return ran


EXAMPLES = ("hf_to_megatron", "verify", "megatron_to_hf", "inspect", "reshard", "merge", "upcycle")


@pytest.mark.parametrize("tool", ["merge", "upcycle", "quantize"])
@pytest.mark.parametrize(
    "change, words", [(tools._missing, "1 missing"), (tools._shape, "has shape (31, 56)")]
)
def test_no_tool_makes_anything_of_half_a_model(
    ranks: Worlds,
    hf_models: dict[str, Path],
    tmp_path: Path,
    tool: str,
    change: Callable[[dict[str, Tensor]], None],
    words: str,
) -> None:
    source, out = (
        tools._damaged(hf_models["dense"], tmp_path / "source", change),
        str(tmp_path / "out"),
    )
    arguments = {
        "merge": ["--inputs", str(source), str(source), "--out", out],
        "upcycle": ["--hf", str(source), "--out", out],
        "quantize": ["--hf", str(source), "--out", out, "--format", "fp8-block"],
    }
    [message] = ranks(1).run(_refused_command, tool, arguments[tool])
    assert words in message and str(source) in message, message
    assert not (tmp_path / "out").exists()


def _refused_command(tool: str, arguments: list[str]) -> str:
    return tools._refusal(_main(tool), arguments)


def _main(tool: str) -> Callable[[list[str]], int]:
    main: Callable[[list[str]], int] = importlib.import_module(f"checkpoint_tools.{tool}").main
    return main


def test_a_rank_that_fails_ends_the_others_and_only_it_explains(
    hf_models: dict[str, Path], tmp_path: Path
) -> None:
    """Under torchrun, where ranks that have done their share wait for the others."""
    source = tools._damaged(hf_models["dense"], tmp_path / "source", tools._nan)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    tool = ["-m", "checkpoint_tools.hf_to_megatron", "--hf", str(source)]
    done = subprocess.run(
        [*launcher, *tool, "--out", str(tmp_path / "ckpt")],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode != 0
    words = (
        f"{source / SINGLE}: {tools.LAYER}mlp.down_proj.weight has 1 of 6272 elements that are NaN"
    )
    assert done.stderr.count(words) == 1
    # torchrun's own report aside there is no traceback
    assert "[rank" not in done.stderr, done.stderr[-3000:]
    assert not (tmp_path / "ckpt").exists()
