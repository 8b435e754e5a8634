"""`prism-megatron bench` with a tiny model on two ranks: what it measures, writes and compares."""

from __future__ import annotations

import gc
import gzip
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist
import yaml

from checkpoint_tools.headers import hf_directory
from model_providers.architecture import Qwen3VLConfig
from model_providers.qwen3_vl import Qwen3VLModel
from prism_megatron.bench import command, workload
from prism_megatron.config import schema
from prism_megatron.data import digit_sums
from prism_megatron.flops import training_flops
from prism_megatron.pipelines import tiny_model
from tests.dist.ranks import Ranks

Worlds = Callable[[int], Ranks]
SYSTEM_PROMPT = Path(__file__).parents[2] / "configs/quickstart/system_prompt.txt"
SHAPE = workload.Shape(shortest=40, longest=80, side=8)
TRAIN = "--backend cpu --rows 2 --shortest 40 --longest 80 --side 8 --micro-batch-tokens 200"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, data, and configurations of rlvr and sync-check."""
    out = tmp_path_factory.mktemp("bench")
    digit_sums.build(schema.DigitSums(out=out / "data", train_rows=12, heldout_rows=2))
    tiny_model.run(
        schema.TinyModel(
            out=out / "tiny", data=out / "data" / "sft.json", system_prompt=SYSTEM_PROMPT
        )
    )
    shared: dict[str, Any] = {
        "run": {"dir": "overridden"},
        "data": {
            "path": str(out / "data" / "prompts.parquet"),
            "system_prompt": str(SYSTEM_PROMPT),
            "max_prompt_tokens": 192,
        },
        "policy": {"path": str(out / "tiny"), "parallel": {"tensor": 2}},
        "sampling": {"n": 3, "max_new_tokens": 10},
    }
    sync_check = shared | {"prompts": 4}
    rlvr = shared | {
        "train": {"steps": 1, "micro_batch_tokens": 1024, "save_every": 2},
        "policy_optimizer": {"lr": 1e-4},
        "prompts_per_step": 2,
        "kl_coef": 0.01,
    }
    (out / "sync-check.yaml").write_text(yaml.safe_dump(sync_check))
    (out / "rlvr.yaml").write_text(yaml.safe_dump(rlvr))
    return out


def _run(arguments: list[str]) -> None:
    command.main(arguments)


def _refused(arguments: list[str]) -> bool:
    """Whether this rank is told that the folder is there, which the second one does not see."""
    exists = Path.exists

    def seen(path: Path) -> bool:
        return exists(path) and not (dist.get_rank() == 1 and path.name == "run-rlvr")

    with mock.patch.object(Path, "exists", seen):
        with pytest.raises(ValueError, match="run-rlvr is there already"):
            command.main(arguments)
    return True


def result(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    assert found["peak_memory_gib"] > 0.1
    assert found["versions"]["megatron-core"] and "git_commit" in found and found["device"]
    assert found["gpus"] == 2
    return found


def _held(arguments: list[str]) -> list[int]:
    """How many models there still are when each of them is built."""
    build, models, held = Qwen3VLModel.__init__, [], []

    def counted(self: Qwen3VLModel, *args: Any, **kwargs: Any) -> None:
        held.append(sum(model() is not None for model in models))
        models.append(weakref.ref(self))
        build(self, *args, **kwargs)

    # which would happen by itself at some time
    gc.disable()
    try:
        with mock.patch.object(Qwen3VLModel, "__init__", counted):
            command.main(arguments)
    finally:
        gc.enable()
    return held


def test_a_combination_has_the_memory_of_those_before(
    ranks: Worlds, root: Path, tmp_path: Path
) -> None:
    arguments = ["train", "--model", str(root / "tiny"), "--recompute", "none", "full", "--out"]
    arguments += [str(tmp_path), *TRAIN.split(), "--steps", "1", "--warmup", "0"]
    assert ranks(2).run(_held, arguments) == [[0, 0]] * 2


def test_training_of_every_combination(ranks: Worlds, root: Path, tmp_path: Path) -> None:
    arguments = ["train", "--model", str(root / "tiny"), "--tensor", "1", "2", "--out"]
    arguments += [str(tmp_path), *TRAIN.split(), "--steps", "2", "--warmup", "0"]
    arguments += ["--profile", str(tmp_path / "profile.txt"), "--save", str(tmp_path)]
    ranks(2).run(_run, arguments)
    assert sorted(path.name for path in tmp_path.glob("*.json")) == [
        "train-tiny-2gpus-tensor2.json",
        "train-tiny-2gpus.json",
    ]
    found = result(tmp_path / "train-tiny-2gpus.json")
    split = result(tmp_path / "train-tiny-2gpus-tensor2.json")
    assert (split["layout"]["tensor"], split["layout"]["vision"]) == (2, "sharded")
    # the same rows, so at the same start the same loss
    assert split["shape"] == found["shape"] == vars(SHAPE)
    assert found["losses"][0] > found["losses"][1] - 1
    config = Qwen3VLConfig.from_hf(hf_directory(root / "tiny"))
    flops = []
    for number, seconds in zip((100, 101), found["steps_s"], strict=True):
        batch = workload.rows(config, 4, number, SHAPE)
        lengths = [len(sequence) for sequence in batch]
        assert all(40 <= length <= 80 for length in lengths)
        total = training_flops(config, lengths, [(1, 8, 8)] * 4).total
        flops.append(total / seconds / 2 / 1e12)
    assert found["tflops_per_gpu"] == pytest.approx(sum(flops) / 2)
    assert found["tokens_per_step"] == sum(lengths)
    assert found["mfu"] is None
    assert "aten::" in (tmp_path / "profile.txt").read_text()
    with gzip.open(tmp_path / "profile.trace.json.gz", "rt") as trace:
        assert json.load(trace)["traceEvents"]
    assert 0 < found["profile"]["busy_s"] <= found["profile"]["span_s"]
    first, second = found["saves"]
    assert 0 < second["stall_s"] < second["total_s"] and second["steps_s"]
    # weights, the optimizer's main weights and two moments, all in fp32
    size = sum(f.stat().st_size for f in (root / "tiny").glob("*.safetensors")) / 2**30
    assert 3.9 * size < first["gib"] < 4.4 * size
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_training_with_the_whole_tower_on_every_rank(
    ranks: Worlds, root: Path, tmp_path: Path
) -> None:
    arguments = ["train", "--model", str(root / "tiny"), "--tensor", "2", "--vision", "replicated"]
    arguments += ["--out", str(tmp_path), *TRAIN.split(), "--steps", "1", "--warmup", "0"]
    ranks(2).run(_run, arguments)
    found = result(tmp_path / "train-tiny-2gpus-tensor2-visionreplicated.json")
    assert found["layout"]["vision"] == "replicated"


def test_a_layout_that_does_not_divide_is_refused(
    ranks: Worlds, root: Path, tmp_path: Path
) -> None:
    arguments = ["train", "--model", str(root / "tiny"), "--tensor", "3", "--out"]
    with pytest.raises(Exception, match="needs a multiple of 3 ranks"):
        ranks(2).run(_run, [*arguments, str(tmp_path), *TRAIN.split()])
    with pytest.raises(Exception, match="the image smaller than the shortest row"):
        ranks(2).run(_run, ["train", "--model", str(root / "tiny"), "--backend", "cpu",
                            "--shortest", "10", "--out", str(tmp_path)])  # fmt: skip


def test_steps_of_a_stage_by_phase(ranks: Worlds, root: Path, tmp_path: Path) -> None:
    arguments = ["step", "rlvr", "--config", str(root / "rlvr.yaml"), "--steps", "3"]
    arguments += ["--warmup", "1", "--out", str(tmp_path), "sampling.n=4"]
    ranks(2).run(_run, arguments)
    found = result(tmp_path / "step-rlvr.json")
    assert found["config"]["sampling"]["n"] == 4
    lines = (tmp_path / "run-rlvr" / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines]
    assert [step["step"] for step in steps] == [1, 2, 3, 4]
    split = found["split_s"]
    assert set(split) == {"rollout", "score", "log_probs", "train", "sync", "save", "idle"}
    assert all(seconds > 0 for seconds in split.values())
    # all of a step is in one phase; saving comes before it
    assert sum(split.values()) - split["save"] == pytest.approx(sum(found["steps_s"]) / 3)
    # saved after step 2, which step 3 tells
    assert [("time/save" in step) for step in steps] == [False, False, True, False]
    assert found["tokens_per_s_per_gpu"] > 0
    assert 0 < found["tflops_per_gpu"] < found["train_tflops_per_gpu"]
    assert ranks(2).run(_refused, arguments) == [True, True]


def test_engines_sample_and_get_weights(ranks: Worlds, root: Path, tmp_path: Path) -> None:
    for kind in ("rollout", "sync"):
        arguments = [kind, "--config", str(root / "sync-check.yaml"), "--repeat", "2"]
        ranks(2).run(_run, [*arguments, "--out", str(tmp_path)])
    found = result(tmp_path / "rollout.json")
    assert len(found["response_tokens"]) == 2
    assert all(4 * 3 <= tokens <= 4 * 3 * 10 for tokens in found["response_tokens"])
    assert found["tokens_per_s"] == 2 * found["tokens_per_s_per_gpu"] > 0
    synced = result(tmp_path / "sync.json")
    # in the rank itself there are no phases
    assert synced["split_s"] == {} and synced["step_s"] > 0
