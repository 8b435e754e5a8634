"""sync-check passes where weights come and computes what the engine does, and fails where not."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from unittest import mock

import pytest
from torch import Tensor

from prism_megatron.config import schema
from prism_megatron.data import digit_sums
from prism_megatron.pipelines import sync_check, tiny_model
from prism_megatron.rollout.local import LocalEngine
from tests.dist.ranks import Ranks

Worlds = Callable[[int], Ranks]
SYSTEM_PROMPT = Path(__file__).parents[2] / "configs/quickstart/system_prompt.txt"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sync_check")
    digit_sums.build(schema.DigitSums(out=out / "data", train_rows=8, heldout_rows=2))
    tiny_model.run(
        schema.TinyModel(
            out=out / "tiny", data=out / "data" / "sft.json", system_prompt=SYSTEM_PROMPT
        )
    )
    return out


def _config(root: Path, out: Path) -> schema.SyncCheck:
    return schema.SyncCheck.model_validate(
        {
            "run": {"dir": out},
            "data": {
                "path": root / "data" / "prompts.parquet",
                "system_prompt": SYSTEM_PROMPT,
                "max_prompt_tokens": 192,
            },
            "policy": {"path": root / "tiny", "parallel": {"tensor": 2}},
            "sampling": {"n": 3, "max_new_tokens": 10},
            "prompts": 4,
            "max_distance": 1e-4,
        }
    )


def _passes(root: Path, out: Path) -> None:
    sync_check.run(_config(root, out))


def _fails(root: Path, out: Path) -> tuple[str, str]:
    """What is said of weights that do not come, and of an engine that computes something else."""
    load = LocalEngine.load_weights

    def once(self: LocalEngine, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        list(tensors)
        self._weight_version = version

    def changed(self: LocalEngine, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        load(self, ((n, t * 1.1 if "v_proj" in n else t) for n, t in tensors), version)

    said = []
    for broken in (once, changed):
        with (
            mock.patch.object(LocalEngine, "load_weights", broken),
            pytest.raises(RuntimeError) as error,
        ):
            sync_check.run(_config(root, out))
        said.append(str(error.value))
    return said[0], said[1]


def test_all_weights_come_and_are_computed_with(ranks: Worlds, root: Path, tmp_path: Path) -> None:
    ranks(2).run(_passes, root, tmp_path)
    report = json.loads((tmp_path / "sync_check.json").read_text())
    assert report["problems"] == [] and report["weight_versions"] == [1]
    assert report["tokens"] > 4 * 3 and report["mean_distance"] < 1e-4


def test_what_does_not_come_or_is_not_computed_alike_is_told(
    ranks: Worlds, root: Path, tmp_path: Path
) -> None:
    missing, other = ranks(2).run(_fails, root, tmp_path)[0]
    assert "tensors differ" in missing
    assert "apart on average" in other and "tensors differ" not in other
