"""A process group of trainers and engines; both sides import it, so it needs torch alone."""

from datetime import timedelta

import torch
from torch import Tensor
from torch.distributed import PrefixStore, ProcessGroup, TCPStore, Work, distributed_c10d


def join(
    host: str, port: int, world: int, rank: int, name: str, backend: str, seconds: float = 1800
) -> ProcessGroup:
    """A group with processes that are not of this world; gloo waits here for all to join, NCCL in
    the first broadcast.

    host, port: where rank 0 listens; seconds: how long a rank may take to join, or to take part.
    torch can only make groups of the ranks of a world, so this goes below its public interface, in
    the way that SGLang's side of such a group does.
    """
    timeout = timedelta(seconds=seconds)
    # torch's rendezvous would have torchrun's own store in place of one at this address
    store = TCPStore(host, port, None, rank == 0, timeout, wait_for_workers=False)
    group, _ = distributed_c10d._new_process_group_helper(
        world,
        rank,
        [],
        distributed_c10d.Backend(backend),
        PrefixStore(name, store),
        group_name=name,
        timeout=timeout,
    )
    distributed_c10d._world.pg_group_ranks[group] = {i: i for i in range(world)}
    return group


def leave(group: ProcessGroup) -> None:
    """Let go of the group, also where others died; its memory, store and port are free when the
    caller's reference is gone too.

    NCCL waits for the other processes of this host that are alive to leave: have them do so at the
    same time.
    """
    distributed_c10d._abort_process_group(group)


def broadcast(tensor: Tensor, group: ProcessGroup) -> Work:
    """Begin to send from rank 0 to all; FP8 as the bytes that it is, since gloo knows no such
    type."""
    if tensor.dtype is torch.float8_e4m3fn:
        tensor = tensor.view(torch.uint8)
    work: Work = torch.distributed.broadcast(tensor, src=0, group=group, async_op=True)
    return work
