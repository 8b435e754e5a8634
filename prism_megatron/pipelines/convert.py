"""Hugging Face directory to Megatron checkpoint, by the ranks that the layout names."""

from __future__ import annotations

from checkpoint_tools.hf_to_megatron import convert
from model_providers import backend as backends
from prism_megatron.config import schema
from prism_megatron.training.setup import layout_of


def run(config: schema.Convert) -> None:
    """Write config.out; it loads at any layout."""
    backend = backends.create(config.backend)
    convert(config.hf, config.out, layout_of(config.parallel), backend, config.value_head)
