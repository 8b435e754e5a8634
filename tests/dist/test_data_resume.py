"""SFT on a blend: killed between checkpoints, gone on with on other ranks, the same rows."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch.distributed as dist

from prism_megatron.config import schema
from prism_megatron.data import digit_sums
from prism_megatron.pipelines import sft, tiny_model
from prism_megatron.training.runner import ModelRunner
from prism_megatron.types import Sequence
from tests.dist.ranks import Ranks

Worlds = Callable[[int], Ranks]
SYSTEM_PROMPT = Path(__file__).parents[2] / "configs/quickstart/system_prompt.txt"
STEPS, SAVE_EVERY, DIES_IN = 7, 2, 6


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model; files.json with images in files, two of them gone; bytes.parquet."""
    out = tmp_path_factory.mktemp("blend")
    digit_sums.build(schema.DigitSums(out=out, train_rows=23, heldout_rows=2))
    tiny_model.run(
        schema.TinyModel(out=out / "tiny", data=out / "sft.json", system_prompt=SYSTEM_PROMPT)
    )
    items = json.loads((out / "sft.json").read_text())
    items[3]["images"] = items[8]["images"] = ["images/gone.png"]
    (out / "files.json").write_text(json.dumps(items))
    prompts = pq.read_table(out / "prompts.parquet").to_pylist()[:9]
    rows = [
        {
            "messages": [
                *row["prompt"],
                {"role": "assistant", "content": row["teacher_response"] * (1 + i % 3)},
            ],
            "images": row["images"],
        }
        for i, row in enumerate(prompts)
    ]
    pq.write_table(pa.Table.from_pylist(rows), out / "bytes.parquet", row_group_size=4)
    return out


def _train(
    root: Path,
    out: Path,
    num_workers: int,
    dies_in: int | None,
    unread: tuple[int, ...] = (),
) -> list[list[int]]:
    """The tokens of what this rank was given in each step. unread: images, by the order in which
    the last rank reads them, that it alone can't read."""
    config = schema.SFT.model_validate(
        {
            "run": {"dir": out},
            "data": {
                "sources": [
                    {"path": root / "files.json", "weight": 2},
                    {"path": root / "bytes.parquet", "weight": 1},
                ],
                "max_bad_share": 0.25,
                "num_workers": num_workers,
                "max_prompt_tokens": 512,
                "max_response_tokens": 512,
            },
            "model": {"path": root / "tiny"},
            "optimizer": {"lr": 1e-4},
            "batch_size": 6,
            "train": {"steps": STEPS, "save_every": SAVE_EVERY, "micro_batch_tokens": 1024},
        }
    )
    given: list[list[int]] = []
    reads = 0

    def step(model: ModelRunner, sequences: list[Sequence]) -> dict[str, float]:
        given.append([len(sequence.input_ids) for sequence in sequences])
        if len(given) == dies_in:
            raise KeyboardInterrupt
        return real(model, sequences)

    def read_bytes(path: Path) -> bytes:
        nonlocal reads
        reads += path.suffix == ".png"
        if reads in unread and dist.get_rank() == dist.get_world_size() - 1:
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        return read(path)

    real, read = sft.step, Path.read_bytes
    try:
        with (
            mock.patch.object(sft, "step", step),
            mock.patch.object(Path, "read_bytes", read_bytes),
        ):
            sft.run(config)
    except KeyboardInterrupt:
        assert dies_in is not None
    return given


def _lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_a_run_goes_on_with_the_same_rows_on_other_ranks(
    ranks: Worlds, root: Path, tmp_path: Path, before: int, after: int
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    ranks(1).run(_train, root, whole, 0, None)
    ranks(before).run(_train, root, broken, 2, DIES_IN)
    assert len(_lines(broken)) == DIES_IN - 1
    assert sorted(p.name for p in (broken / "checkpoints").iterdir()) == ["step_000004"]
    ranks(after).run(_train, root, broken, 1, None)
    want, found = _lines(whole), _lines(broken)
    assert [line["step"] for line in found] == list(range(1, STEPS + 1))
    # demonstrations differ in length, so that their sums tell which rows the steps had
    assert [line["tokens"] for line in found] == [line["tokens"] for line in want]
    assert len({line["tokens"] for line in want}) > 3
    for one, other in zip(found, want, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["epoch/files"] == other["epoch/files"]
    state = json.loads((broken / f"checkpoints/step_{STEPS:06d}/state.json").read_text())["data"]
    assert (
        state
        == json.loads((whole / f"checkpoints/step_{STEPS:06d}/state.json").read_text())["data"]
    )
    assert state["files"]["used"] == 4 * STEPS and state["bytes"]["used"] == 2 * STEPS
    quarantined = (broken / "quarantine.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["row"] for line in quarantined) == ["files:3", "files:8"]


def test_ranks_train_the_same_batches_where_one_fails_to_read_a_file(
    ranks: Worlds, root: Path, tmp_path: Path
) -> None:
    first, last = ranks(2).run(_train, root, tmp_path, 0, None, (3, 10, 12))
    assert first == last and all(len(sizes) == 6 for sizes in first)
    lines = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    alone = [line for line in lines if line["reason"].endswith(" (on ranks [1] of 2 alone)")]
    assert len(alone) == 3 and {line["row"] for line in lines} >= {"files:3", "files:8"}
    assert all("Permission denied" in line["reason"] for line in alone)
