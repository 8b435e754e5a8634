"""From the shards that the ranks hold to whole tensors in Hugging Face's layout.

Planned once, from what every rank says that it holds; then run as often as weights are wanted, one
bucket of tensors at a time, so that no rank ever has the whole model twice:

    holders:   shards of the bucket, end to end --> send buffer --all-to-all--> receive buffer
    receivers: receive buffer, own parameters --slice by slice--> the bucket's tensors

A receiver reads what it holds in its own parameters. The rest comes in two rounds: each shard to
one receiver of every host where nobody holds it, and then from those that have it to the others of
their host. So a shard goes to a host once, and no rank has to send it to all others by itself. The
transforms of the weight map say which slice lies where. Of tensors to be quantised the slices meet
in scratch memory, and only what becomes of them is in the bucket. Fused experts may come in parts.
"""

from __future__ import annotations

import socket
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from math import prod
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from model_providers import fp8_blocks
from model_providers.architecture import Qwen3VLConfig
from model_providers.qwen3_vl import Qwen3VLModel, Read
from model_providers.weight_map import Task, Transform, all_tasks, local_tasks, transform_to

# what any kernel wants that loads 16 bytes at once, and more than any element takes
_ALIGNMENT = 256
_BUCKET_BYTES = 2**26
_QUANTISED_AT_ONCE = 2**25
"""Elements; rounding them takes a few times as much memory in fp32."""

Quantization = Literal["fp8-block"]


@dataclass(frozen=True)
class Slice:
    """`length` entries along the transform's dimension: from shard `part` to a whole tensor."""

    part: int
    source: int
    target: int
    length: int


@dataclass(frozen=True)
class Whole:
    """A tensor at byte `offset` of its bucket, or of the bucket's scratch memory."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int

    def of(self, buffer: Tensor) -> Tensor:
        """Its place in the bucket's bytes."""
        return _place(buffer, self.offset, self.shape, self.dtype)

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def part(self, name: str, index: int, parts: int) -> Whole:
        """One of `parts` equal matrices that a matrix has one below the other."""
        shape = (self.shape[0] // parts, self.shape[1])
        return Whole(name, shape, self.dtype, self.offset + index * self.nbytes // parts)


@dataclass(frozen=True)
class Quantised:
    """A whole tensor in scratch memory, and the place in the bucket of what becomes of it."""

    source: Whole
    weight: Whole
    scale: Whole


class Round:
    """Shards that travel at the same time: what this rank sends to each rank and gets from it."""

    def __init__(self) -> None:
        world = dist.get_world_size()
        self.sent: list[list[Task]] = [[] for _ in range(world)]
        self.received: list[list[Task]] = [[] for _ in range(world)]
        self.is_empty = True
        """Of all ranks."""

    def add(self, task: Task, sender: int, receiver: int) -> None:
        """Every rank calls this with the same, in the same order."""
        self.is_empty = False
        if sender == dist.get_rank():
            self.sent[receiver].append(task)
        if receiver == dist.get_rank():
            self.received[sender].append(task)


@dataclass
class Bucket:
    """Tensors that travel together."""

    tensors: list[Whole] = field(default_factory=list)
    """As receivers get them."""
    tasks: list[Task] = field(default_factory=list)
    nbytes: int = 0
    plain: list[Whole] = field(default_factory=list)
    """Those of the tensors that shards are put together to."""
    quantised: list[Quantised] = field(default_factory=list)
    scratch: int = 0
    """Bytes, of those that are quantised."""
    rounds: list[Round] = field(default_factory=list)


class WeightPlan:
    """Who sends which shard to whom, and where its slices go."""

    def __init__(
        self,
        model: Qwen3VLModel,
        *,
        receivers: Sequence[int] | None = None,
        bucket_bytes: int = _BUCKET_BYTES,
        cut_experts: bool = False,
        quantization: Quantization | None = None,
    ) -> None:
        """Every rank calls this with the same arguments.

        receivers: ranks that get the whole tensors; all if None. bucket_bytes: a bucket ends before
        it would grow above this, scratch memory included; a larger tensor has one to itself.
        cut_experts: fused experts that do not fit come in parts, named NAME[first:end].
        quantization: fp8-block has the decoder's projections come in FP8 with their scales, experts
        one by one (fp8_blocks.py).

        Raises:
            ValueError: a projection can't be cut into blocks.
        """
        self.model, self.config, self.device = model, model.architecture, model.backend.device
        own = self.config.num_experts // model.parallel.layout.expert
        self._together = self._experts_together(own, bucket_bytes if cut_experts else None)
        # an expert at a time, the host would take longer than the device to copy them
        local = list(local_tasks(model, stack=max(1, min(own, self._together))))
        self.local = {entry.task: entry for entry in local}
        self.quantization = quantization
        self.receivers = list(range(dist.get_world_size()) if receivers is None else receivers)
        self._slices: dict[tuple[Transform, tuple[int, ...], int], list[list[Slice]]] = {}
        holders = all_tasks(model, local)
        self.buckets = self._buckets(list(holders), bucket_bytes)
        hosts: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(hosts, socket.gethostname())
        for bucket in self.buckets:
            self._route(bucket, holders, hosts)

    @property
    def nbytes(self) -> int:
        """Of all tensors, as receivers get them."""
        return sum(whole.nbytes for bucket in self.buckets for whole in bucket.tensors)

    def buffer(self) -> Tensor:
        """Memory for any bucket."""
        return self._bytes(max(bucket.nbytes for bucket in self.buckets))

    def fill(
        self, bucket: Bucket, out: Tensor | None, read: Read | None = None
    ) -> list[tuple[str, Tensor]]:
        """Write the bucket's tensors into `out` [nbytes] uint8; names and views of them.

        All ranks call this together; those that are no receivers pass None and get nothing. `read`
        says what to take of a parameter: the model's read_weight, or the gradient to compare
        layouts. The work is queued on the device's current stream: wait for it before another
        process reads `out`.
        """
        own = self._own(bucket, read or self.model.read_weight)
        arrived = self._exchange(bucket, own)
        if out is None:
            return []
        scratch = self._bytes(bucket.scratch)
        tensors = {whole.name: whole.of(out) for whole in bucket.plain}
        tensors |= {made.source.name: made.source.of(scratch) for made in bucket.quantised}
        copies = _Copies()
        for task in bucket.tasks:
            source = arrived[task] if task in arrived else own[task]
            self._place_slices(task, source, tensors, copies)
        copies.run()
        for made in bucket.quantised:
            _quantise(made.source.of(scratch), made.weight.of(out), made.scale.of(out))
        return [(whole.name, whole.of(out)) for whole in bucket.tensors]

    def weights(self, read: Read | None = None) -> Iterator[tuple[str, Tensor]]:
        """Every tensor under its name, bucket by bucket; all ranks iterate together, and those that
        are no receivers get nothing."""
        receives = dist.get_rank() in self.receivers
        for bucket in self.buckets:
            yield from self.fill(bucket, self.buffer() if receives else None, read)

    def _experts_together(self, own: int, most: int | None) -> int:
        """How many experts a tensor has: all, or as many as fit. They are of one rank, or all of
        some ranks."""
        config = self.config
        if most is None or not config.num_experts:
            return config.num_experts
        size = 2 * config.moe_intermediate_size * config.hidden_size
        fit = most // (size * self.model.backend.dtype.itemsize)
        return max(
            count
            for count in range(1, config.num_experts + 1)
            if (count == 1 or count <= fit)
            and config.num_experts % count == 0
            and (own % count == 0 or count % own == 0)
        )

    def _named(self, name: str, task: Task) -> str:
        """The tensor of that Hugging Face name, or the part of it, that a shard belongs to."""
        if task.expert < 0 or self._together == self.config.num_experts:
            return name
        first = self._first(task)
        return f"{name}[{first}:{first + self._together}]"

    def _first(self, task: Task) -> int:
        return task.expert // self._together * self._together

    def _buckets(self, tasks: list[Task], most: int) -> list[Bucket]:
        buckets, taken = [Bucket()], 0

        def together(task: Task) -> tuple[str, ...]:
            # the tensors of one parameter, and the experts of one tensor or of a part of it
            return tuple(self._named(name, task) for name in task.hf)

        for names, group in groupby(tasks, together):
            members = list(group)
            self._check_complete(members)
            whole = self._whole(members)
            size = sum(_room(tensor) for tensor in whole)
            if taken and taken + size > most:
                buckets.append(Bucket())
                taken = 0
            taken += size
            buckets[-1].tasks += members
            for hf, name, tensor in zip(members[0].hf, names, whole, strict=True):
                matrices = self._matrices(hf, members[0]) if self.quantization else []
                self._add(buckets[-1], name, tensor, matrices)
        return buckets

    def _add(self, bucket: Bucket, name: str, tensor: Tensor, names: list[str]) -> None:
        """Give the tensor, or what becomes of it, a place in the bucket.

        names: of the matrices that it is quantised to, none if it stays.
        """
        shape = tuple(tensor.shape)
        if not names:
            whole = Whole(name, shape, tensor.dtype, bucket.nbytes)
            bucket.plain.append(whole)
            bucket.tensors.append(whole)
            bucket.nbytes += _room(tensor)
            return
        rows, columns, block = prod(shape[:-1]), shape[-1], fp8_blocks.BLOCK
        if rows // len(names) % block or columns % block:
            raise ValueError(
                f"{names[0]} with shape {(rows // len(names), columns)} can't be cut into blocks "
                f"of {block}, which quantization={self.quantization} needs; leave it out"
            )
        source = Whole(name, shape, tensor.dtype, bucket.scratch)
        bucket.scratch += _room(tensor)
        weight = Whole(name, (rows, columns), torch.float8_e4m3fn, bucket.nbytes)
        bucket.nbytes += _aligned(weight.nbytes)
        places = (rows // block, columns // block)
        scale = Whole(name + fp8_blocks.SCALE, places, torch.float32, bucket.nbytes)
        bucket.nbytes += _aligned(scale.nbytes)
        bucket.quantised.append(Quantised(source, weight, scale))
        for i, part in enumerate(names):
            bucket.tensors.append(weight.part(part, i, len(names)))
            bucket.tensors.append(scale.part(part + fp8_blocks.SCALE, i, len(names)))

    def _matrices(self, name: str, task: Task) -> list[str]:
        """Names of what a shard's tensor, or its part, is quantised to."""
        names = fp8_blocks.projections(name, self.config.num_experts)
        if task.expert < 0:
            return names
        each = len(names) // self.config.num_experts
        return names[each * self._first(task) :][: each * self._together]

    def _check_complete(self, members: list[Task]) -> None:
        experts = self._together if members[0].expert >= 0 else 1
        expected = experts * members[0].parts
        found = sum(task.experts for task in members)
        assert found == expected, f"{members[0].hf} has {found} shards on the ranks, not {expected}"

    def _whole(self, members: list[Task]) -> list[Tensor]:
        """The tensors, or parts of them, that these shards make up, on the meta device."""
        task = members[0]
        transform = transform_to(task.hf[0])
        shard = torch.empty(task.own_shape, dtype=getattr(torch, task.dtype), device="meta")
        pieces = transform.to_hf(transform.join([shard] * task.parts), self.config)
        if task.expert < 0:
            return pieces
        return [piece.expand(self._together, *piece.shape) for piece in pieces]

    def _route(self, bucket: Bucket, holders: dict[Task, list[int]], hosts: list[str]) -> None:
        between, within = bucket.rounds = [Round(), Round()]
        for index, task in enumerate(bucket.tasks):
            have, want = defaultdict[str, list[int]](list), defaultdict[str, list[int]](list)
            for rank in holders[task]:
                have[hosts[rank]].append(rank)
            for rank in self.receivers:
                if rank not in holders[task]:
                    want[hosts[rank]].append(rank)
            # everywhere spread over those who could, so that they send alike
            for number, (host, receivers) in enumerate(want.items()):
                if host not in have:
                    first = receivers[index % len(receivers)]
                    senders = holders[task]
                    between.add(task, senders[(index + number) % len(senders)], first)
                    have[host].append(first)
                for place, receiver in enumerate(receivers):
                    if receiver not in have[host]:
                        within.add(task, have[host][(index + place) % len(have[host])], receiver)

    def _bytes(self, count: int) -> Tensor:
        return torch.empty(count, dtype=torch.uint8, device=self.device)

    def _own(self, bucket: Bucket, read: Read) -> dict[Task, Tensor]:
        """This rank's shards; it reads those that nobody wants from it too, as ranks that hold the
        same ones may have to read them together."""
        own = {}
        for task in bucket.tasks:
            if task in self.local:
                entry = self.local[task]
                own[task] = entry.of(read(entry.parameter)).contiguous()
                assert own[task].dtype == getattr(torch, task.dtype), "others expect its dtype"
        return own

    def _exchange(self, bucket: Bucket, own: dict[Task, Tensor]) -> dict[Task, Tensor]:
        """The shards that come from other ranks."""
        arrived: dict[Task, Tensor] = {}
        for each in bucket.rounds:
            if each.is_empty:
                continue
            give, take = (
                [sum(map(_shard_room, tasks)) for tasks in side]
                for side in (each.sent, each.received)
            )
            sending, receiving = self._bytes(sum(give)), self._bytes(sum(take))
            copies = _Copies()
            for task, place in _shards(sending, each.sent):
                copies.add(place, own[task] if task in own else arrived[task])
            copies.run()
            dist.all_to_all_single(receiving, sending, take, give)
            arrived |= _shards(receiving, each.received)
        return arrived

    def _place_slices(
        self, task: Task, source: Tensor, tensors: dict[str, Tensor], copies: _Copies
    ) -> None:
        transform = transform_to(task.hf[0])
        for name, slices in zip(task.hf, self._slices_of(task, transform), strict=True):
            target = tensors[self._named(name, task)]
            if task.expert >= 0:
                target = target.narrow(0, task.expert - self._first(task), task.experts)
            if transform.dim is None:
                copies.add(target.view(source.shape), source)
                continue
            # counted from the last, as several experts have an axis before the transform's
            dim = transform.dim - len(task.own_shape)
            for part in slices:
                if part.part == task.part:
                    copies.add(
                        target.narrow(dim, part.target, part.length),
                        source.narrow(dim, part.source, part.length),
                    )

    def _slices_of(self, task: Task, transform: Transform) -> list[list[Slice]]:
        key = transform, task.own_shape, task.parts
        if key not in self._slices:
            self._slices[key] = slices(transform, task.own_shape, task.parts, self.config)
        return self._slices[key]


def slices(
    transform: Transform, shape: Sequence[int], parts: int, config: Qwen3VLConfig
) -> list[list[Slice]]:
    """For each Hugging Face tensor, the slices that it is made of, of `parts` shards of `shape`.

    Found by sending entry numbers in place of weights through the transform itself, so that the
    table has one source. Empty lists for a tensor that is not split.
    """
    dim = transform.dim
    if dim is None:
        return [[]]
    length = shape[dim]
    thin = [length if axis == dim else 1 for axis in range(len(shape))]
    numbers = torch.arange(parts * length).split(length)
    whole = transform.join([part.reshape(thin) for part in numbers])
    return [_runs(piece.flatten(), length) for piece in transform.to_hf(whole, config)]


def _runs(numbers: Tensor, length: int) -> list[Slice]:
    """Stretches of one shard's consecutive entries."""
    steps = torch.arange(len(numbers))
    new = (numbers[1:] != numbers[:-1] + 1) | (numbers[1:] % length == 0)
    starts = [0, *(steps[1:][new]).tolist()]
    ends = [*starts[1:], len(numbers)]
    first = numbers[starts].tolist()
    return [
        Slice(number // length, number % length, start, end - start)
        for number, start, end in zip(first, starts, ends, strict=True)
    ]


class _Copies:
    """Copies to run together: thousands of small ones cost more to launch than to do."""

    def __init__(self) -> None:
        self._pairs: dict[tuple[torch.dtype, bool], tuple[list[Tensor], list[Tensor]]] = {}

    def add(self, target: Tensor, source: Tensor) -> None:
        # what is contiguous and of one type goes through few kernels, the rest one by one
        key = source.dtype, target.is_contiguous() and source.is_contiguous()
        targets, sources = self._pairs.setdefault(key, ([], []))
        targets.append(target)
        sources.append(source)

    def run(self) -> None:
        for targets, sources in self._pairs.values():
            torch._foreach_copy_(targets, sources)


def _shards(buffer: Tensor, lists: list[list[Task]]) -> Iterator[tuple[Task, Tensor]]:
    offset = 0
    for tasks in lists:
        for task in tasks:
            yield task, _place(buffer, offset, task.shape, getattr(torch, task.dtype))
            offset += _shard_room(task)


def _place(buffer: Tensor, offset: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    size = prod(shape) * dtype.itemsize
    return buffer[offset : offset + size].view(dtype).view(shape)


def _quantise(source: Tensor, weight: Tensor, scale: Tensor) -> None:
    """Some rows of blocks at a time: source [..., columns] -> weight [rows, columns] and scale
    [rows / 128, columns / 128]."""
    block = fp8_blocks.BLOCK
    step = max(1, _QUANTISED_AT_ONCE // (block * weight.shape[1]))
    parts = source.view(weight.shape).split(step * block)
    for part, to, scales in zip(parts, weight.split(step * block), scale.split(step), strict=True):
        fp8_blocks.round_blocks(part, to, scales)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def _room(tensor: Tensor) -> int:
    return _aligned(tensor.numel() * tensor.element_size())


def _shard_room(task: Task) -> int:
    return _aligned(prod(task.shape) * getattr(torch, task.dtype).itemsize)


def iter_hf_weights(model: Qwen3VLModel, read: Read | None = None) -> Iterator[tuple[str, Tensor]]:
    """Yield every weight under its Hugging Face name, whole, on every rank.

    `read` says what to take of a parameter: the model's read_weight, or the gradient to compare
    layouts.

    All ranks iterate together, a bucket at a time, so no rank ever holds the whole model. Fused
    experts come as transformers 5 has them. Tied weights come once, under the embedding's name.
    """
    yield from WeightPlan(model).weights(read)
