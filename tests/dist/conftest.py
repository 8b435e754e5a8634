from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import tiny_models
from tests.dist.ranks import Ranks


@pytest.fixture(scope="package")
def ranks() -> Iterator[Callable[[int], Ranks]]:
    """ranks(n): a world of n gloo ranks, spawned on first use and shared by the tests of this
    folder; those of the next one get the cores to themselves."""
    worlds: dict[int, Ranks] = {}

    def get(world: int) -> Ranks:
        if world not in worlds:
            worlds[world] = Ranks(world)
        return worlds[world]

    yield get
    for world in worlds.values():
        world.close()


@pytest.fixture(scope="session")
def hf_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Hugging Face directories: dense, dense with tied embeddings, Mixture-of-Experts, with
    experts divided between the sections; the deep ones have six layers instead of four."""
    root = tmp_path_factory.mktemp("hf")
    return {
        "dense": tiny_models.save(root / "dense", "dense"),
        "tied": tiny_models.save(root / "tied", "dense", tied=True),
        "moe": tiny_models.save(root / "moe", "moe"),
        "deep": tiny_models.save(root / "deep", "dense", tied=True, layers=6),
        "deep-moe": tiny_models.save(root / "deep-moe", "moe", layers=6),
        "dedicated": tiny_models.save(root / "dedicated", "dedicated"),
    }
