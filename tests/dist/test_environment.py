"""What hosts find out about each other; here two ranks pass for two hosts."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch.distributed as dist

from prism_megatron import environment
from tests.dist.ranks import Ranks


def _check_shared(folder: Path, apart: bool) -> None:
    mine = folder / str(dist.get_rank()) if apart else folder / "run"
    with (
        mock.patch.dict("os.environ", LOCAL_WORLD_SIZE="1", MASTER_ADDR="node-a"),
        mock.patch.object(environment, "VISIBLE_SECONDS", 0.5 if apart else 60),
    ):
        environment.check_shared(mine)


@pytest.fixture
def two(ranks: Callable[[int], Ranks]) -> Ranks:
    return ranks(2)


def test_one_folder_of_all_hosts_passes_and_nothing_is_left_in_it(
    two: Ranks, tmp_path: Path
) -> None:
    two.run(_check_shared, tmp_path, False)
    assert [file.name for file in tmp_path.rglob("*")] == ["run"]


def test_a_folder_that_is_another_one_elsewhere_stops_all_ranks(two: Ranks, tmp_path: Path) -> None:
    assert two.run(_refused, tmp_path, True) == [True, True]


def test_a_folder_that_the_first_host_can_not_write_stops_all_ranks(
    two: Ranks, tmp_path: Path
) -> None:
    (tmp_path / "run").write_text("a file")
    assert two.run(_refused, tmp_path, False) == [True, True]


def _refused(folder: Path, apart: bool) -> bool:
    words = "is another folder on" if apart else "can't be written on"
    with pytest.raises(ValueError, match=words):
        _check_shared(folder, apart)
    return True


def _offsets(ahead: float) -> list[float]:
    now = time.time
    shift = ahead * dist.get_rank()
    group = dist.group.WORLD
    assert group is not None
    with mock.patch.object(environment.time, "time", lambda: now() + shift):
        return environment.clock_offsets(group)


def test_a_clock_that_is_ahead_is_seen_by_all(two: Ranks) -> None:
    for offsets in two.run(_offsets, 1000.0):
        assert offsets[0] == 0 and abs(offsets[1] - 1000) < 100
