"""Dense policy to Mixture-of-Experts discriminator."""

from __future__ import annotations

from checkpoint_tools import upcycle
from checkpoint_tools.hf_directory import HFDirectory
from checkpoint_tools.megatron_weights import structure_of
from model_providers import backend as backends
from prism_megatron.config import schema


def run(config: schema.Upcycle) -> None:
    """Write config.out, a Hugging Face directory with value head; ranks share the shards."""
    backends.create("cpu").init_process_group()
    structure_of(HFDirectory(config.hf))
    upcycle.upcycle(**dict(config))
