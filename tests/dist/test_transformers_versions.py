"""Checkpoints that transformers 4.57.6 and 5.6.0 themselves wrote, of the same weights
(tests/fixtures/transformers_versions.py): equal tensors, and the logits that each had computed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from checkpoint_tools import hf_to_megatron
from checkpoint_tools.hf_directory import HFDirectory
from checkpoint_tools.megatron_weights import MegatronWeights
from checkpoint_tools.verify import verify
from tests.dist.ranks import Ranks
from tests.fixtures.transformers_versions import EXPECTED, FIXTURES, KINDS, WRITERS

Worlds = Callable[[int], Ranks]


def _names_differing(hf: Path, ckpt: Path) -> list[str]:
    source, converted = HFDirectory(hf), MegatronWeights(ckpt)
    assert set(source) == set(converted)
    return [name for name in source if not torch.equal(source[name], converted[name])]


@pytest.mark.parametrize("kind", KINDS)
def test_both_formats_hold_the_same_weights(ranks: Worlds, tmp_path: Path, kind: str) -> None:
    old, new = (FIXTURES / version / kind for version in WRITERS)
    shapes = [
        {
            name: tuple(tensor.shape)
            for name, tensor in load_file(path / "model.safetensors").items()
        }
        for path in (old, new)
    ]
    # else this would compare a format with itself
    assert (shapes[0] == shapes[1]) == (kind == "dense")
    ranks(1).run(hf_to_megatron.convert, old, tmp_path / "ckpt")
    assert ranks(1).run(_names_differing, new, tmp_path / "ckpt") == [[]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("version", WRITERS)
def test_the_logits_are_those_of_the_version_that_wrote(
    ranks: Worlds, tmp_path: Path, version: str, kind: str
) -> None:
    path = FIXTURES / version / kind
    example = load_file(path / EXPECTED)
    wanted = example.pop("logits")
    model = AutoModelForImageTextToText.from_pretrained(path).eval()
    with torch.no_grad():
        found = model(**example).logits[0]
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    ranks(1).run(hf_to_megatron.convert, path, tmp_path / "ckpt")
    [report] = ranks(1).run(verify, path, tmp_path / "ckpt")
    assert report["differences"] == [] and report["logits"] <= 1e-5, report
