"""`python -m prism_megatron` and `torchrun -m prism_megatron`: the same as `prism-megatron`."""

from __future__ import annotations

from prism_megatron.cli import run

run()
