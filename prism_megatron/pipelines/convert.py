"""Hugging Face directory to Megatron checkpoint; ranks share the layers."""

from __future__ import annotations

from checkpoint_tools.hf_to_megatron import convert
from model_providers import backend as backends
from prism_megatron.config import schema


def run(config: schema.Convert) -> None:
    """Write config.out; it loads at any layout."""
    backends.create("cpu").init_process_group()
    convert(config.hf, config.out, config.value_head)
