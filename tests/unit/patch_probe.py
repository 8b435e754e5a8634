"""Trains two small models with a checkpoint in between, once without each of the patches.

    python -m tests.unit.patch_probe FOLDER [ENTRY ...]

Every run is a fork of this process, which has imported everything and patched nothing. Prints one
JSON object: entry ("" for none) -> the error that ended its run, or null.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import (
    get_cuda_rng_tracker,
    model_parallel_cuda_manual_seed,
)

from model_providers import megatron_cpu
from model_providers.config import TrainingOptions
from model_providers.parallel import Layout
from model_providers.qwen3_vl import Head
from prism_megatron.training.runner import ModelRunner
from tests import tiny_models
from tests.dist import checks


def _train(path: Path, head: Head, folder: Path) -> None:
    runner = checks.make_runner(path, Layout(), head, training=TrainingOptions(aux_loss_coef=0.1))
    _step(runner, head)
    ckpt = folder / "ckpt"
    runner.save(ckpt, path)
    wanted = _step(runner, head)
    runner = checks.make_runner(path, Layout(), head, training=TrainingOptions(aux_loss_coef=0.1))
    runner.load(ckpt)
    assert _step(runner, head) == wanted, "resumed training differs"


def _draw_random_numbers() -> None:
    """Tensor-parallel ranks draw from a stream of their own, which leaves the common one alone."""
    model_parallel_cuda_manual_seed(7, tp_rank=1, ep_rank=0, etp_rank=0)
    torch.manual_seed(7)
    first, second = torch.rand(2).split(1)
    torch.manual_seed(7)
    assert torch.equal(torch.rand(1), first)
    with get_cuda_rng_tracker().fork():
        own = torch.rand(1)
    assert torch.equal(torch.rand(1), second), "the common stream was drawn from"
    torch.manual_seed(7 + 2718 + 1)
    assert torch.equal(torch.rand(1), own), "the stream is not seeded by rank"


def _step(runner: ModelRunner, head: Head) -> float:
    loss = checks.weighted_loss(30) if head == "language" else checks.final_score_loss
    return runner.train_step(checks.mixed_batch(), loss).sums["loss"]


def _run(entry: str, models: dict[str, Path], folder: Path) -> None:
    store = dist.FileStore(str(folder / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    parallel_state._set_global_memory_buffer()
    without = partial(megatron_cpu.apply, without=(entry,))
    with mock.patch.object(megatron_cpu, "apply", without):
        _train(models["dense"], "language", folder)
        _train(models["moe"], "score", folder)
        _draw_random_numbers()


def _fork(entry: str, models: dict[str, Path], folder: Path) -> str | None:
    folder.mkdir()
    if (child := os.fork()) == 0:
        # nothing of a child may go on in the parent's code
        try:
            _run(entry, models, folder)
            os._exit(0)
        except BaseException:
            (folder / "error").write_text(traceback.format_exc())
            os._exit(1)
    _, status = os.waitpid(child, 0)
    if status == 0:
        return None
    error = folder / "error"
    return error.read_text() if error.exists() else f"died with status {status}"


def main(folder: Path, entries: list[str]) -> None:
    torch.set_num_threads(1)
    models = {kind: tiny_models.save(folder / kind, kind) for kind in ("dense", "moe")}
    found = {
        entry: _fork(entry, models, folder / f"without-{i}")
        for i, entry in enumerate(["", *(entries or megatron_cpu.PATCHES)])
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
