"""The optimizer's state in host memory, of which an update has a piece at a time on the device.

    host      main weights and moments, pinned
       | piece n + 1 comes                          _bring
    device    piece n is updated, its weights go to the model
       | piece n - 1 goes back                      _send_back
    host

The copies in both directions and the update run beside each other, so that an update takes about as
long as the slower direction, and the device has three pieces. All data-parallel ranks cut alike,
since weights in FP8 are rounded together.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import torch
from megatron.core.fp8_utils import quantize_param_shard
from torch import Tensor

from model_providers.backend import Backend
from model_providers.fp8_weights import is_rounded
from model_providers.host_memory import on_host
from model_providers.memory import PIECE
from prism_megatron.training.optimizer import allocate_moments, in_parts, update_in_parts


@dataclass
class _Piece:
    """Some parameters of the model, and what this rank has of their state."""

    models: list[Tensor]
    mains: dict[int, Tensor]
    """By index in models, what the optimizer updates; of a parameter in fp32 a part of itself."""
    state: list[Tensor] = field(default_factory=list)
    """What lies on the host."""


class HostState:
    """Main weights and moments of megatron.core's optimizer, on the device while they are used.

    The tensors stay the same objects, between two updates without storage.
    """

    def __init__(self, optimizer: Any, backend: Backend) -> None:
        """optimizer: of build_optimizer, without moments."""
        self._backend = backend
        self._incoming, self._outgoing = backend.side_stream(), backend.side_stream()
        self._host: dict[Tensor, Tensor] = {}
        # a rank that has nothing to train has a stub
        for part in (p for p in optimizer.chained_optimizers if not p.is_stub_optimizer):
            pieces = _cut(part)
            mains = [main for piece in pieces for main in piece.mains.values()]
            moments = [m for main in mains for m in _hollow_moments(part, main)]
            own = [main for group in part.shard_fp32_from_float16_groups for main in group]
            self._host |= dict(zip(own + moments, on_host(own + moments), strict=True))
            for moment in moments:
                self._host[moment].zero_()
            for main in own:
                self._host[main].copy_(main, non_blocking=True)
                main.untyped_storage().resize_(0)
            for piece in pieces:
                tensors = [t for m in piece.mains.values() for t in (m, *_moments(part, m))]
                piece.state = [tensor for tensor in tensors if tensor in self._host]
            self._update_by_piece(part, pieces)

    def values(self, tensor: Tensor) -> Tensor:
        """What one of them is after the last update, on the host, for the device's next work."""
        return self._host.get(tensor, tensor)

    @contextmanager
    def on_host(self) -> Iterator[None]:
        """The tensors are those in host memory inside, for who reads or changes all of them."""
        self._backend.synchronize()
        hollow = [tensor.data for tensor in self._host]
        for tensor, host in self._host.items():
            tensor.data = host
        try:
            yield
        finally:
            for tensor, data in zip(self._host, hollow, strict=True):
                tensor.data = data

    def _update_by_piece(self, part: Any, pieces: list[_Piece]) -> None:
        """Put this in the place of what the parts of megatron.core's step do with all at once."""
        update_in_parts(part.optimizer, lambda: self._on_device(part, pieces))
        part._copy_main_params_to_model_params = lambda: None

    def _on_device(self, part: Any, pieces: list[_Piece]) -> Iterator[list[Tensor]]:
        """What is to be updated of one piece after the other, which then are on the device."""
        leaving: list[tuple[_Piece, Any]] = []
        arrival = self._bring(pieces[0])
        for piece, following in zip_longest(pieces, pieces[1:]):
            if len(leaving) == 2:
                self._free(*leaving.pop(0))
            arrived, arrival = arrival, self._bring(following) if following else None
            _wait(arrived)
            yield list(piece.mains.values())
            _to_model(part, piece)
            leaving.append((piece, self._send_back(piece)))
        for each in leaving:
            self._free(*each)

    # A piece's memory is taken and given back in the order of the current stream, as that of
    # activations is, which then can have it; the side streams wait for it, and it for them.

    def _bring(self, piece: _Piece) -> Any:
        for tensor in piece.state:
            tensor.untyped_storage().resize_(self._host[tensor].nbytes)
        return self._copy(self._incoming, [(tensor, self._host[tensor]) for tensor in piece.state])

    def _send_back(self, piece: _Piece) -> Any:
        return self._copy(self._outgoing, [(self._host[tensor], tensor) for tensor in piece.state])

    def _copy(self, stream: torch.Stream | None, pairs: list[tuple[Tensor, Tensor]]) -> Any:
        """Copy to the first from the second of each pair behind the current work; what to wait for
        until that is done."""
        if stream is not None:
            stream.wait_event(torch.accelerator.current_stream().record_event())
        with stream or nullcontext():
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
        return stream and stream.record_event()

    def _free(self, piece: _Piece, gone: Any) -> None:
        _wait(gone)
        for tensor in piece.state:
            tensor.untyped_storage().resize_(0)


def _wait(event: Any) -> None:
    """Have the current stream wait, if anything runs beside it."""
    if event is not None:
        torch.accelerator.current_stream().wait_event(event)


def _cut(part: Any) -> list[_Piece]:
    """All data-parallel ranks cut alike, whatever each has of a parameter."""
    pieces = []
    for models in in_parts((p for buffer in part.buffers for p in buffer.params), PIECE):
        mains = {}
        for i, model in enumerate(models):
            if model in part.model_param_gbuf_map:
                group, order = part.model_param_group_index_map[model]
                mains[i] = part.optimizer.param_groups[group]["params"][order]
        pieces.append(_Piece(models, mains))
    return pieces


def _moments(part: Any, main: Tensor) -> list[Tensor]:
    # not torch's count of updates
    return [m for m in part.optimizer.state[main].values() if isinstance(m, Tensor) and m.dim()]


def _hollow_moments(part: Any, main: Tensor) -> list[Tensor]:
    """Those of one parameter, made and deprived of their memory."""
    allocate_moments(part.optimizer, main)
    found = _moments(part, main)
    for moment in found:
        moment.untyped_storage().resize_(0)
    return found


def _to_model(part: Any, piece: _Piece) -> None:
    """What DistributedOptimizer._copy_main_params_to_model_params does with all parameters."""
    rounded = [i for i, model in enumerate(piece.models) if is_rounded(model)]
    spans = {i: part._get_model_param_range_map(piece.models[i]) for i in piece.mains}
    for i, main in piece.mains.items():
        model = piece.models[i]
        if i not in rounded and main.dtype != model.dtype:
            buffer, _, bucket = part.model_param_gbuf_map[model]
            place = spans[i]["gbuf_world_in_bucket"]
            weights = part.buffers[buffer].buckets[bucket].param_data.view(-1)
            weights[place.start : place.end].copy_(main)
    if rounded:
        quantize_param_shard(
            [piece.models[i] for i in rounded],
            [piece.mains.get(i) for i in rounded],
            [spans[i]["param"].start if i in spans else None for i in rounded],
            part.data_parallel_group,
        )
