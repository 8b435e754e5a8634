"""Poisoned batches and gradients in SFT: what is skipped, what is gone back to, what stops."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from prism_megatron.config import schema
from prism_megatron.data import digit_sums
from prism_megatron.data.stream import BatchStream
from prism_megatron.pipelines import sft, tiny_model
from prism_megatron.training.guard import Guard, Unsound
from prism_megatron.training.runner import ModelRunner
from prism_megatron.types import Sequence
from tests.dist.ranks import Ranks

Worlds = Callable[[int], Ranks]
SYSTEM_PROMPT = Path(__file__).parents[2] / "configs/quickstart/system_prompt.txt"
STEPS = 6
LIMITS = {"max_prompt_tokens": 512, "max_response_tokens": 512}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("guard")
    digit_sums.build(schema.DigitSums(out=out, train_rows=24, heldout_rows=2))
    tiny_model.run(
        schema.TinyModel(out=out / "tiny", data=out / "sft.json", system_prompt=SYSTEM_PROMPT)
    )
    return out


def _poisoned(sequences: list[Sequence]) -> list[Sequence]:
    """The same with an image that is not a number."""
    first, *others = sequences
    [image] = first.images
    broken = replace(image, patches=torch.full_like(image.pixel_values, torch.nan))
    return [replace(first, images=(broken,)), *others]


def _train(
    root: Path,
    out: Path,
    guard: dict[str, Any],
    batches: Collection[int] = (),
    gradients: Collection[int] = (),
    factor: float = float("inf"),
    dropped: Collection[int] = (),
    steps: int = STEPS,
    save_every: int = 2,
) -> str:
    """SFT in which these batches, counted from 1, hold a broken image, have their gradient
    multiplied on the last rank, or are left out; the error it ends with."""
    config = schema.SFT.model_validate(
        {
            "run": {"dir": out},
            "data": {"path": root / "sft.json", "num_workers": 0} | LIMITS,
            "model": {"path": root / "tiny"},
            # whose every step has a rate of its own; one that skips has its own number of steps
            "optimizer": {
                "lr": 1e-3,
                "warmup_steps": 3,
                "schedule": "constant" if guard.get("action") == "skip" else "cosine",
            },
            "batch_size": 4,
            "train": {
                "steps": steps,
                "save_every": save_every,
                "micro_batch_tokens": 1024,
                "guard": guard,
            },
        }
    )
    drawn = 0

    def draw(stream: BatchStream[Any, Any]) -> list[Any]:
        nonlocal drawn
        drawn += 1
        batch = next_batch(stream)
        return draw(stream) if drawn in dropped else batch

    def step(model: ModelRunner, sequences: list[Sequence]) -> dict[str, float]:
        here = drawn in gradients and dist.get_rank() == dist.get_world_size() - 1
        parameter = next(model.model.parameters())
        hook = parameter.register_hook(lambda grad: grad * factor) if here else None
        try:
            return real(model, _poisoned(sequences) if drawn in batches else sequences)
        finally:
            if hook is not None:
                hook.remove()

    next_batch, real = BatchStream.next_batch, sft.step
    try:
        with (
            mock.patch.object(sft, "step", step),
            mock.patch.object(BatchStream, "next_batch", draw),
        ):
            sft.run(config)
    except Unsound as error:
        return str(error)
    return ""


def _lines(out: Path, *but: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    kept = {"loss", "grad_norm", "lr", "tokens", "skipped_updates", "step"} - set(but)
    return [{k: v for k, v in line.items() if k in kept} for line in lines]


def test_skipped_updates_leave_no_trace(ranks: Worlds, root: Path, tmp_path: Path) -> None:
    """Of a broken batch, and of a gradient that is broken on one of two ranks."""
    guard = {"action": "skip"}
    broken = (root, tmp_path / "broken", guard, (3,), (5,))
    assert ranks(2).run(_train, *broken, float("inf"), (), STEPS + 2) == ["", ""]
    options = ((), (), float("inf"), (3, 5))
    assert ranks(2).run(_train, root, tmp_path / "clean", guard, *options) == ["", ""]
    found = _lines(tmp_path / "broken")
    assert [line["skipped_updates"] for line in found] == [0, 0, 1, 0, 1, 0, 0, 0]
    assert "loss" not in found[2] and found[4]["loss"] > 0
    made = [line for line in found if not line["skipped_updates"]]
    clean = _lines(tmp_path / "clean")
    assert [line | {"step": 0} for line in made] == [line | {"step": 0} for line in clean]
    assert "NaN" not in (tmp_path / "broken" / "metrics.jsonl").read_text()


def test_a_rewound_run_goes_on_behind_the_broken_batch(
    ranks: Worlds, root: Path, tmp_path: Path
) -> None:
    guard = {"action": "rewind"}
    assert ranks(2).run(_train, root, tmp_path / "broken", guard, (4,)) == ["", ""]
    # back to the checkpoint of step 2, whose models never saw batches 3 and 4
    options = ((), (), float("inf"), (3, 4))
    assert ranks(2).run(_train, root, tmp_path / "clean", guard, *options) == ["", ""]
    found = _lines(tmp_path / "broken")
    assert found == _lines(tmp_path / "clean")
    assert [line["step"] for line in found] == list(range(1, STEPS + 1))


def _bounds(root: Path, out: Path) -> list[str]:
    always = range(3, 100)
    return [
        _train(root, out / "stop", {}, (4,)),
        _train(root, out / "early", {"action": "rewind"}, (1,)),
        _train(root, out / "skip", {"action": "skip", "limit": 2}, always),
        _train(root, out / "rewind", {"action": "rewind", "limit": 2}, always),
        _train(root, out / "spike", {"spike": 50, "window": 2}, (), (4,), 1e4),
        _train(root, out / "usual", {"spike": 50, "window": 2}, (), (2,), 1e4),
    ]


def test_a_run_stops_with_what_was_wrong_and_where_to_go_on(
    ranks: Worlds, root: Path, tmp_path: Path
) -> None:
    stop, early, skip, rewind, spike, usual = ranks(1).run(_bounds, root, tmp_path)[0]
    assert stop.startswith("step 4 of stop: the loss is NaN or infinite in 1 of 1 micro-batches")
    assert f"go on from {tmp_path}/stop/checkpoints/step_000002, at a lower" in stop
    assert "there is no checkpoint yet" in early
    assert skip.startswith("step 5 of skip") and "2 updates in a row were skipped before" in skip
    assert "checkpoints/step_000002 after 2 returns to it" in rewind
    assert "step 4 of spike: grad_norm=" in spike and "train.guard.spike=50 times" in spike
    # before there is a median everything is usual
    assert usual == ""
    assert [line["step"] for line in _lines(tmp_path / "spike")] == [1, 2, 3]


def test_a_spike_is_one_beside_the_median_of_what_was_accepted() -> None:
    guard = Guard(schema.Guard(action="skip", spike=2, window=3))
    for value in (1.0, 9.0, 3.0):
        assert guard.judge({"loss": value}) == ""
        guard.accept({"loss": value})
    assert "loss=6.5 is above train.guard.spike=2 times 3, the median of the last 3" in guard.judge(
        {"loss": 6.5}
    )
    assert not guard.judge({"loss": 6.0})
    again = Guard(guard.config)
    again.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    assert again.judge({"loss": 6.5}) and not again.judge({"loss": 6.0})
    for value in (-1.0, -1.0, -1.0):
        guard.accept({"loss": value})
    assert not guard.judge({"loss": 5.0})
