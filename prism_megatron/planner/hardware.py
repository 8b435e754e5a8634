"""What GPUs and the links between them do: datasheets, and shares of them that were measured.

Each measured constant names the run in docs/results/h200 that it comes from; all of them are from
H200s of one host with NVLink. Links between hosts are an assumption.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GPU:
    """Datasheet of a Hopper GPU."""

    name: str
    gigabytes: int
    """Memory by name, in 1e9 bytes; the device has 5 to 7 % more, which are left for what the
    allocator can't use."""
    hbm: float
    """Bytes a second of its memory."""
    bf16: float = 989e12
    """Dense FLOP/s."""
    fp8: float = 1979e12


H100 = GPU("H100", 80, 3.35e12)
H200 = GPU("H200", 141, 4.8e12)

PEAK_BF16 = {"H100": H100.bf16, "H200": H200.bf16}
"""FLOP/s by what the device's name has in it, for MFU."""

PRODUCTS = 0.8
"""Share of the peak of large matrix products in BF16 (decoder.json: 790 TFLOP/s)."""
FP8_PRODUCTS = 0.9
"""The same in FP8 (dense-tensorwise-kernels.csv: 0.75 s of products, of which 0.21 s are of the
head and the tower in BF16)."""
GROUPED_PRODUCTS = 0.4
"""What is left of that for experts, with permuting their tokens (decoder.json: 30B-A3B, EP1)."""
FP8_EXPERTS = 1.5
"""How many times as fast experts' products are in FP8, casting left out (expert-products.json:
720 to 1,090 TFLOP/s after 590 to 675)."""
ATTENTION = 0.24
"""Share of the BF16 peak of attention, forward and backward, the tower's included
(dense-tensorwise-kernels.csv: 0.36 s)."""
HBM = 0.8
"""Share of the memory's rate that kernels reach (dense-bf16-kernels.csv: Adam)."""
PASSES = 8.5
"""How often norms, activations, rotations and sums read or write each byte that is kept for the
backward pass (dense-tensorwise-kernels.csv: 0.32 s of other kernels)."""
CAST_BYTES = 7
"""Bytes read and written to bring an element of a product's input to FP8, its maximum and its
transpose included (dense-tensorwise-kernels.csv: 0.10 s)."""
NVLINK = 327e9
"""Bytes a second that a GPU gathers from the others of its host (decoder.json)."""
ALL_TO_ALL = 0.4
"""Share of it that sending tokens to experts reaches, waiting for the slowest rank included
(decoder.json: 30B-A3B, EP4)."""
HOST = 45e9
"""Bytes a second from a GPU to host memory and as many back at the same time
(dense-1gpu-offload-*.json: 70 GB in 1.4 to 1.7 s of an update; in one direction alone 54 GB/s)."""
GAP = 0.8e-3
"""Seconds a layer and micro-batch in which no kernel runs (dense-bf16.json less the kernels of
dense-bf16-kernels.csv)."""
LAUNCH = 5e-3
"""Seconds that the host takes to queue what a layer or a block of the tower computes for a
micro-batch, forward and backward, at the least (save-2b.json: 156 of them in a step of 0.90 s, of
which the device computes less)."""
NETWORK = 40e9
"""Bytes a second of a GPU's network card, an assumption: 400 Gb/s each, of which 80 % arrive."""
NODE = 8
"""GPUs of a host, which share NVLink."""
