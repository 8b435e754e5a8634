"""More ranks than GPUs, each as if on a host of its own: the numbers of many GPUs, not their speed.

    torchrun --nproc-per-node N -m tests.gpu.shared_gpu MODULE [ARGUMENT ...]

Runs the module as `-m MODULE` would; cuda:0 is GPU `local rank * GPUs / ranks`. NCCL refuses two
ranks of a host on one GPU (init.cc, "Duplicate GPU detected") and tells hosts apart by NCCL_HOSTID:
under other names ranks exchange through sockets, with the kernels and in the order of real hosts.
They take turns on the GPU, so that a collective takes 20 ms.
"""

from __future__ import annotations

import os
import runpy
import sys


def main() -> None:
    module, *arguments = sys.argv[1:]
    gpus = os.environ["CUDA_VISIBLE_DEVICES"].split(",")
    rank, ranks = (int(os.environ[name]) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    own = gpus.pop(rank * len(gpus) // ranks)
    os.environ |= {
        "CUDA_VISIBLE_DEVICES": ",".join([own, *gpus]),
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "NCCL_HOSTID": f"rank-{os.environ['RANK']}",
        "NCCL_SOCKET_IFNAME": "lo",
        "NCCL_IB_DISABLE": "1",
    }
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
