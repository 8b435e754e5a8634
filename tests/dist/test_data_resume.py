"""SFT on a blend: killed between checkpoints, gone on with on other ranks, the same rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prism_megatron.config import schema
from prism_megatron.data import digit_sums
from prism_megatron.pipelines import sft, tiny_model
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


def _train(root: Path, out: Path, num_workers: int, dies_in: int | None) -> None:
    config = schema.SFT.model_validate(
        {
            "run": {"dir": out},
            "data": {
                "sources": [
                    {"path": root / "files.json", "weight": 2},
                    {"path": root / "bytes.parquet", "weight": 1},
                ],
                "max_bad_share": 0.2,
                "num_workers": num_workers,
            },
            "model": {"path": root / "tiny"},
            "optimizer": {"lr": 1e-4},
            "batch_size": 6,
            "train": {"steps": STEPS, "save_every": SAVE_EVERY, "micro_batch_tokens": 1024},
        }
    )
    taken = 0

    def step(*args: Any) -> dict[str, float]:
        nonlocal taken
        taken += 1
        if taken == dies_in:
            raise KeyboardInterrupt
        return real(*args)

    real = sft.step
    try:
        with mock.patch.object(sft, "step", step):
            sft.run(config)
    except KeyboardInterrupt:
        assert dies_in is not None


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
