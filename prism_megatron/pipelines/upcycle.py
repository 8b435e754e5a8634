"""Dense policy to Mixture-of-Experts discriminator."""

from __future__ import annotations

import json
from pathlib import Path

from checkpoint_tools import upcycle
from checkpoint_tools.files import check_replaceable
from checkpoint_tools.hf_directory import HFDirectory
from checkpoint_tools.megatron_weights import structure_of
from model_providers import backend as backends
from prism_megatron.config import schema


def run(config: schema.Upcycle) -> None:
    """Write config.out, a Hugging Face directory with value head; ranks share the shards.
    ValueError if something else is there."""
    check_replaceable(config.out, [config.hf], _is_discriminator)
    backends.create("cpu").init_process_group()
    structure_of(HFDirectory(config.hf))
    upcycle.upcycle(**dict(config))


def _is_discriminator(folder: Path) -> bool:
    config = folder / "config.json"
    return config.exists() and "prism_discriminator" in json.loads(config.read_text())
