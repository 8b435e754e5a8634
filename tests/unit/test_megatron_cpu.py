"""Every patch of megatron.core is needed, and none disturbs anything else."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from model_providers.megatron_cpu import PATCHES


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    """Error of training without each entry, None where it worked; see patch_probe.py."""
    probe = [sys.executable, "-m", "tests.unit.patch_probe", str(tmp_path_factory.mktemp("probe"))]
    run = subprocess.run(probe, capture_output=True, text=True, timeout=500, check=False)
    assert run.returncode == 0, run.stderr
    found: dict[str, str | None] = json.loads(run.stdout.splitlines()[-1])
    return found


def test_training_runs_with_all_patches(outcomes: dict[str, str | None]) -> None:
    assert outcomes[""] is None


@pytest.mark.parametrize("entry", PATCHES)
def test_training_fails_without_the_patch(outcomes: dict[str, str | None], entry: str) -> None:
    assert outcomes[entry] is not None, f"{entry} is not needed; remove it from PATCHES"


AFTER_PATCHING = """
import torch
from model_providers import megatron_cpu

megatron_cpu.apply()
with torch.device("meta"):
    assert torch.tensor([1.0]).device.type == "meta"
    assert torch.zeros(2).device.type == "meta"
assert torch.zeros(2, device="cuda").device.type == "cpu"
assert torch.tensor([1], device="cuda:1").device.type == "cpu"
assert torch.ones(2).type(torch.int64).dtype == torch.int64
"""


def test_patched_factories_still_follow_a_device_context() -> None:
    """transformers builds models on "meta" and asks torch.tensor whether it does so."""
    run = subprocess.run(
        [sys.executable, "-c", AFTER_PATCHING], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
