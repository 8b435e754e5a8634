"""A process group of trainers and engines; both sides import it, so it needs torch alone."""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, distributed_c10d


def join(address: str, world: int, rank: int, name: str, backend: str) -> ProcessGroup:
    """A group with processes that are not of this world; returns when all have joined.

    address: tcp://HOST:PORT of rank 0. torch can only make groups of the ranks of a world, so this
    goes below its public interface, in the way that SGLang's side of such a group does.
    """
    timeout = distributed_c10d.default_pg_timeout
    store, _, _ = next(distributed_c10d.rendezvous(address, rank, world, timeout=timeout))
    store.set_timeout(timeout)
    group, _ = distributed_c10d._new_process_group_helper(
        world,
        rank,
        [],
        distributed_c10d.Backend(backend),
        distributed_c10d.PrefixStore(name, store),
        group_name=name,
        timeout=timeout,
    )
    distributed_c10d._world.pg_group_ranks[group] = {i: i for i in range(world)}
    return group


def broadcast(tensor: Tensor, group: ProcessGroup | None) -> None:
    """From rank 0 to all; FP8 as the bytes that it is, since gloo knows no such type."""
    if tensor.dtype is torch.float8_e4m3fn:
        tensor = tensor.view(torch.uint8)
    torch.distributed.broadcast(tensor, src=0, group=group)
