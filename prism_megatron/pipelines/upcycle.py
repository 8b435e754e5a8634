"""Dense policy to Mixture-of-Experts discriminator."""

from __future__ import annotations

from checkpoint_tools import upcycle
from prism_megatron.config import schema


def run(config: schema.Upcycle) -> None:
    """Write config.out, a Hugging Face directory with value head."""
    upcycle.upcycle(**dict(config))
