"""The processes that share a tool's work: those of a launcher, or this one alone."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch.distributed as dist

from model_providers import backend as backends

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Of glibc's malloc.h."""
WAIT_SECONDS = 7 * 24 * 3600
"""How long ranks that have done their share wait for the others."""


def join() -> None:
    """Join the world that a launcher started; a lone process is a world of one."""
    # glibc gives every freed tensor back to the kernel, which zeroes the next one page by page:
    # a third of a conversion's time
    libc = ctypes.CDLL(None)
    libc.mallopt(M_TRIM_THRESHOLD, -1)
    libc.mallopt(M_MMAP_MAX, 0)
    # a rank that goes on after a kill may have far more left to do than another; one that ended is
    # noticed by its connections
    backends.create("cpu").init_process_group(timeout_seconds=WAIT_SECONDS)


def rank_and_size() -> tuple[int, int]:
    """This process's rank and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def first(action: Callable[[], object]) -> None:
    """Run it on the first rank while the others wait; what fails there fails on all."""
    failed: list[Exception | None] = [None]
    if rank_and_size()[0] == 0:
        try:
            action()
        except (ValueError, OSError) as error:
            failed[0] = error
    if dist.is_initialized():
        with _others():
            dist.broadcast_object_list(failed)
    if failed[0] is not None:
        raise failed[0]


def merged(mine: dict[str, float]) -> dict[str, float]:
    """The entries of all ranks, on every rank."""
    size = rank_and_size()[1]
    gathered: list[dict[str, float]] = [mine] * size
    if size > 1:
        dist.all_gather_object(gathered, mine)
    return {name: value for part in gathered for name, value in part.items()}


def barrier() -> None:
    """Wait for the others; ValueError if one has ended."""
    if dist.is_initialized():
        with _others():
            dist.barrier()


@contextmanager
def _others() -> Iterator[None]:
    """One line instead of a traceback where another rank has told its user what is wrong."""
    try:
        yield
    except RuntimeError as error:
        raise ValueError(f"another rank ended; its own message says why ({error})") from error
