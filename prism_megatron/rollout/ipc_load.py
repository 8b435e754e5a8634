"""An engine's side of checkpoint-engine's protocol; engines import it: torch and ZeroMQ alone.

    trainer                                engine
    a handle on memory                -->  mapped
    lists of what lies where in it    -->  loaded, each answered when its memory may be used again
    None                              -->  unmapped
    None                              -->  `end`
    an exception instead of any       -->  raised

An answer is empty, or says what went wrong.
"""

import gc
import traceback
from collections.abc import Callable
from typing import Any

import torch
import zmq
from torch import Tensor


def receive(
    address: str,
    device: torch.device,
    take: Callable[[list[tuple[str, Tensor]]], None],
    end: Callable[[], None],
) -> None:
    """Take the weights that a trainer lends at `address`.

    take: loads some tensors, whose memory is used again once it returns; end: what follows the
    last. What they raise is told to the trainer, which answers with its own error; that is raised.
    """
    socket = zmq.Context.instance().socket(zmq.REP)
    socket.connect(address)
    memory: Tensor | None = None
    released = False
    try:
        while True:
            message = socket.recv_pyobj()
            if isinstance(message, Exception):
                raise message
            try:
                if isinstance(message, tuple):
                    memory = _mapped(message, device)
                elif message is not None:
                    assert memory is not None, "a bucket before the memory that it is in"
                    take([(item["name"], _tensor(item, memory)) for item in message])
                elif not released:
                    memory, released = None, True
                    _unmap(device)
                else:
                    end()
                    socket.send(b"")
                    return
            except Exception:
                socket.send_string(traceback.format_exc())
            else:
                socket.send(b"")
    finally:
        socket.close()


def _mapped(handle: tuple[Callable[..., Tensor], tuple[Any, ...]], device: torch.device) -> Tensor:
    rebuild, arguments = handle
    if device.type != "cpu":
        # the trainer's number of this GPU is another where it sees others
        arguments = (*arguments[:6], device.index, *arguments[7:])
    return rebuild(*arguments)


def _tensor(item: dict[str, Any], memory: Tensor) -> Tensor:
    shape = torch.Size(item["shape"])
    size = item["dtype"].itemsize * shape.numel()
    stored = memory[item["offset"] : item["offset"] + size]
    return stored.view(item["dtype"]).view(shape)


def _unmap(device: torch.device) -> None:
    gc.collect()
    if device.type != "cpu":
        torch.get_device_module(device).ipc_collect()
        torch.accelerator.empty_cache()
