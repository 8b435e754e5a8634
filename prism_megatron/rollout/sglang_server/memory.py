"""Memory that a server gives back when it is to sleep.

The device may still work on the last batch, whose answers the host has, and on what is copied
before weights go: pause takes pages away at once (cuMemUnmap waits for nothing), and the server
dies of an illegal memory access. SGLang waits after it, in 0.5.12, and not before (its pull
requests 31073 and 37932).
"""

import functools

import torch
from torch_memory_saver.entrypoint import TorchMemorySaver


def wait_before_pause():
    """From now on nothing of this process is paused before the device has finished."""
    pause = TorchMemorySaver.pause

    @functools.wraps(pause)
    def waiting(self, *args, **kwargs):
        torch.accelerator.synchronize()
        return pause(self, *args, **kwargs)

    TorchMemorySaver.pause = waiting
