"""The command line, with a rank 1 that falls asleep in its third step."""

from __future__ import annotations

import sys
import time
from itertools import count
from typing import Any
from unittest import mock

import torch.distributed as dist

from prism_megatron import cli
from prism_megatron.pipelines import sft

if __name__ == "__main__":
    real, steps = sft.step, count(1)

    def step(*args: Any) -> dict[str, float]:
        while next(steps) == 3 and dist.get_rank() == 1:
            time.sleep(10**6)
        return real(*args)

    with mock.patch.object(sft, "step", step):
        sys.exit(cli.main())
