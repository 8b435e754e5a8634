"""Hugging Face directory to Megatron checkpoint; ranks share the layers."""

from __future__ import annotations

from pathlib import Path

from checkpoint_tools.files import check_replaceable
from checkpoint_tools.headers import hf_directory
from checkpoint_tools.hf_to_megatron import convert
from model_providers import backend as backends
from prism_megatron.config import schema


def run(config: schema.Convert) -> None:
    """Write config.out; it loads at any layout. ValueError if something else than a Megatron
    checkpoint is there."""
    check_replaceable(config.out, [config.hf], _is_checkpoint)
    backends.create("cpu").init_process_group()
    convert(config.hf, config.out, config.value_head)


def _is_checkpoint(folder: Path) -> bool:
    try:
        return hf_directory(folder) != folder
    except FileNotFoundError:
        return False
