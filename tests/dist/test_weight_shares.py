"""Data-parallel ranks share out the weights that all of them hold when a checkpoint is written."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import MetadataIndex

from checkpoint_tools import megatron_directory
from model_providers.parallel import Layout
from tests.dist import checks
from tests.dist.test_checkpoints import TP2EP2, TP2SP, Worlds, _differing


@pytest.mark.parametrize(
    "kind, world, layout",
    [
        ("dense", 2, Layout()),
        ("moe", 4, Layout(expert=2)),
        ("moe", 4, TP2EP2),
        ("moe", 2, TP2SP),
        ("moe", 4, Layout(context=2, expert=4)),
        ("tied", 4, Layout(pipeline=2)),
        ("moe", 2, TP2EP2),
    ],
    ids=["dp2", "dp4-ep2", "dp2-tp2-ep2", "tp2", "cp2-ep4", "dp2-pp2", "tp2-ep2"],
)
def test_each_rank_writes_its_share_of_the_weights(
    ranks: Worlds, hf_models: dict[str, Path], tmp_path: Path, kind: str, world: int, layout: Layout
) -> None:
    """Of those that other data-parallel ranks hold as well, for experts others than for the rest;
    what it alone holds it writes itself."""
    ckpt = tmp_path / "ckpt"
    held = ranks(world).run(_save_and_count, hf_models[kind], layout, ckpt)
    written = [{"experts": 0, "rest": 0} for _ in range(world)]
    stored = FileSystemReader(ckpt).read_metadata()
    for key, tensor in stored.state_dict_metadata.items():
        for chunk in getattr(tensor, "chunks", []):
            file = stored.storage_data[MetadataIndex(key, chunk.offsets)].relative_path
            nbytes = math.prod(chunk.sizes) * tensor.properties.dtype.itemsize
            written[int(file[2:].split("_")[0])][_part(key)] += nbytes
    for rank, parts in enumerate(written):
        for part, nbytes in parts.items():
            assert nbytes == pytest.approx(held[rank][part], rel=0.01), (rank, part)
    assert ranks(1).run(_differing, hf_models[kind], Layout(), ckpt) == [[]]


def _part(name: str) -> str:
    return "experts" if ".mlp.experts." in name else "rest"


def _save_and_count(path: Path, layout: Layout, out: Path) -> dict[str, float]:
    """This rank's share of the bytes that its data-parallel ranks hold alike."""
    runner = checks.make_runner(path, layout)
    megatron_directory.save(out, runner.model, path)
    groups = runner.model.parallel.groups
    found = {"experts": 0.0, "rest": 0.0}
    for chunk in megatron_directory._weights(runner.model).values():
        for entry in chunk.values():
            # but not what tensor-parallel ranks, or the first and the last stage, hold alike
            if isinstance(entry.data, Tensor) and not any(entry.replica_id[:2]):
                part = _part(entry.key)
                group = groups.expt_dp if part == "experts" else groups.dp_cp
                found[part] += entry.data.nbytes / group.size()
    return found
