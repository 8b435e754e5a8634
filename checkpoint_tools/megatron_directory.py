"""Megatron checkpoints: a torch_dist folder that loads at any layout, with the Hugging Face config
and processor beside it in hf/, so that one path says everything about a model.

    DIR/*.distcp, metadata.json, common.pt   weights and, in training, optimizer and schedule
    DIR/hf/                                  config.json, tokenizer, processor
"""

from __future__ import annotations

import logging
import queue
import re
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException

from checkpoint_tools.files import replace_folder, staging_of
from checkpoint_tools.headers import hf_directory
from checkpoint_tools.hf_directory import HFDirectory
from checkpoint_tools.hf_writer import copy_config
from checkpoint_tools.optimizer_state import OptimizerState
from checkpoint_tools.torch_dist import TorchDistReader
from model_providers.architecture import Qwen3VLConfig
from model_providers.backend import Backend
from model_providers.config import DEFAULT_OPTIONS, TrainingOptions
from model_providers.fp8_weights import is_rounded, keep
from model_providers.host_memory import on_host
from model_providers.parallel import ParallelState
from model_providers.qwen3_vl import Head, Qwen3VLModel
from model_providers.weight_map import load_hf_weights

# that another package, nvidia-resiliency-ext, would write in processes of its own
logging.getLogger("megatron.core.dist_checkpointing.strategies.torch").addFilter(
    lambda record: "async save is deprecated" not in record.getMessage()
)

EXPERTS = ".mlp.experts."
"""In the keys of what is replicated over the experts' data-parallel ranks."""
COPIERS = 8
"""Threads that copy what lies in host memory."""
EXTRA_STATE = re.compile(r".*\._extra_state\d*")
"""Of a layer, or of one expert of several in a layer."""


def load_model(
    path: Path,
    parallel: ParallelState,
    backend: Backend,
    head: Head = "language",
    options: TrainingOptions = DEFAULT_OPTIONS,
) -> Qwen3VLModel:
    """Build the model that `path` holds and load its weights, whichever of the two formats it is.

    Raises:
        ValueError: weights and config disagree, or the layout does not fit.
    """
    hf = hf_directory(path)
    model = Qwen3VLModel(Qwen3VLConfig.from_hf(hf), parallel, backend, head, options)
    model.to(backend.device)
    if hf == path:
        load_hf_weights(model, HFDirectory(path), str(path))
    else:
        load(path, model)
    return model


def save(
    path: Path,
    model: Qwen3VLModel,
    hf: Path,
    optimizer: Any = None,
    scheduler: Any = None,
) -> None:
    """Write the checkpoint; it appears under its name only when complete. All ranks call this.

    With optimizer and scheduler the checkpoint can be trained on, at any other layout too.
    ValueError if the disk has no room.
    """
    Saving(path, model, hf, optimizer, scheduler).finish()


class Saving:
    """A checkpoint that is being written; see save. All ranks make it, and end it by `finish`."""

    def __init__(
        self,
        path: Path,
        model: Qwen3VLModel,
        hf: Path,
        optimizer: Any = None,
        scheduler: Any = None,
        in_background: bool = False,
        check: bool = True,
    ) -> None:
        """in_background: copy everything to host memory, and write that in a thread; the model may
        change meanwhile. check: that the ranks' shards make up whole tensors, for which all of them
        are told of all; what was right once is right in a model's later checkpoints, too."""
        self.path, self._hf, self._staging = path, hf, staging_of(path)
        self._is_writer = dist.get_rank() == 0
        if self._is_writer:
            shutil.rmtree(self._staging, ignore_errors=True)
            self._staging.mkdir(parents=True)
        dist.barrier()
        # the writers are threads of this process; megatron.core's own queue would start another
        # process in every rank, which outlives a killed run
        filesystem_async._results_queue = queue.Queue()
        self._request = dist_checkpointing.save(
            _to_write(model, optimizer, scheduler),
            str(self._staging),
            validate_access_integrity=check,
            async_sharded_save=True,
            async_strategy="mcore",
        )
        _, buckets, _ = self._request.async_fn_args or (0, [], None)
        self._nbytes = self._check_room(buckets)
        if in_background:
            buckets = [_copied(bucket) for bucket in buckets]
            model.backend.synchronize()
        elif buckets:
            buckets = self._request.preload_fn()
        self._thread = threading.Thread(target=self._write, args=(buckets,), daemon=True)
        self._thread.start()
        if not in_background:
            self._thread.join()

    @property
    def is_writing(self) -> bool:
        """Whether this rank still writes."""
        return self._thread.is_alive()

    def finish(self) -> None:
        """Wait until all ranks have written, and give the checkpoint its name.

        Raises ValueError if one of them could not write.
        """
        self._thread.join()
        try:
            for finalize in self._request.finalize_fns:
                finalize()
        except CheckpointException as error:
            raise ValueError(self._failure(error)) from error
        if self._is_writer:
            copy_config(self._hf, self._staging / "hf")
            replace_folder(self._staging, self.path)
        dist.barrier()

    def _failure(self, error: CheckpointException) -> str:
        """Why it could not be written, which one rank knows."""
        box = [""]
        if self._is_writer:
            free = shutil.disk_usage(self._staging).free
            shutil.rmtree(self._staging)
            reasons = "; ".join(sorted({str(reason) for reason, _ in error.failures.values()}))
            box[0] = (
                f"{self.path} could not be written: it takes {self._nbytes / 2**30:.3g} GiB, and "
                f"its disk had {free / 2**30:.3g} GiB left when that failed; make room or choose "
                f"another folder. {reasons}"
            )
        dist.broadcast_object_list(box)
        return box[0]

    def _write(self, buckets: list[Any]) -> None:
        if buckets:
            rank, _, results = self._request.async_fn_args
            self._request.async_fn(rank, buckets, results, **self._request.async_fn_kwargs)

    def _check_room(self, buckets: list[Any]) -> int:
        """Bytes of all ranks; ValueError if the disk of one has not as many."""
        mine = sum(
            sum(data.getbuffer().nbytes for _, data in objects)
            + sum(tensor.nbytes for _, tensor in tensors)
            for _, _, (objects, tensors) in buckets
        )
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, (mine, shutil.disk_usage(self._staging).free))
        needed, free = sum(n for n, _ in found), min(f for _, f in found)
        if needed > free:
            if self._is_writer:
                shutil.rmtree(self._staging)
            raise ValueError(
                f"{self.path} takes {needed / 2**30:.3g} GiB and its disk has {free / 2**30:.3g} "
                "GiB free; make room or choose another folder"
            )
        return needed


def _copied(bucket: Any) -> Any:
    """What goes into one file, with tensors of its own in host memory."""
    file, key, (objects, tensors) = bucket
    # pinned memory takes copies many times as fast; torch keeps it for the next checkpoint
    copies = on_host([tensor for _, tensor in tensors])
    with ThreadPoolExecutor(COPIERS) as pool:
        waiting = []
        for copy, (_, tensor) in zip(copies, tensors, strict=True):
            # as an offloaded optimizer's state does
            if tensor.is_cpu:
                waiting.append(pool.submit(copy.copy_, tensor.detach()))
            else:
                copy.copy_(tensor.detach(), non_blocking=True)
        for each in waiting:
            each.result()
    own = [(item, copy) for copy, (item, _) in zip(copies, tensors, strict=True)]
    return file, key, (objects, own)


def load(path: Path, model: Qwen3VLModel, optimizer: Any = None, scheduler: Any = None) -> None:
    """Load weights, and with them optimizer and schedule where given.

    Raises:
        ValueError: the checkpoint is of another architecture, or a tensor is missing or of another
            shape than the model's.
    """
    _check_architecture(path, model)
    weights = _weights(model)
    _drop_extra_state(weights, path)
    wanted: dict[str, Any] = {"model": weights}
    if parts := _optimizer_parts(optimizer, weights):
        wanted["optimizer"] = {"parts": {i: part.to_read() for i, part in enumerate(parts)}}
    for chunk in weights.values():
        for entry in chunk.values():
            # into the parameter itself megatron.core would read them rounded, and of gate and up
            # by the scale of what was there before
            if is_rounded(entry.data):
                entry.data = torch.empty(
                    entry.data.shape, dtype=entry.data.dtype, device=entry.data.device
                )
    try:
        state = dist_checkpointing.load(wanted, str(path))
    except CheckpointException as error:
        # torch's, which is no Exception and prints every rank's traceback
        reasons = "; ".join(sorted({str(reason) for reason, _ in error.failures.values()}))
        raise ValueError(f"{path} does not fit the model: {reasons}") from error
    except (CheckpointingException, KeyError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} does not fit the model: {error}") from error
    for i, chunk in enumerate(model.chunks):
        lacking = chunk.load_state_dict(state["model"][i], strict=False)
        missing = [key for key in lacking.missing_keys if not EXTRA_STATE.fullmatch(key)]
        assert not missing and not lacking.unexpected_keys, lacking
        if optimizer is None:
            _keep(chunk, state["model"][i])
    if optimizer is not None:
        for i, part in enumerate(parts):
            # dist_checkpointing drops the empty state of a stage that has nothing to train
            part.restore(state["optimizer"]["step"], state["optimizer"].get("parts", {}).get(i, {}))
        scheduler.load_state_dict(state["scheduler"])


def _drop_extra_state(weights: dict[int, Any], path: Path) -> None:
    """Layers keep scaling factors for FP8 as objects beside their weights. A converted checkpoint
    has none, one from another backend other ones: without them the factors start anew."""
    stored = TorchDistReader(path).objects
    for chunk in weights.values():
        for key in [key for key in chunk if EXTRA_STATE.fullmatch(key)]:
            if chunk[key].unique_key not in stored:
                del chunk[key]


def _check_architecture(path: Path, model: Qwen3VLModel) -> None:
    if different := differences(Qwen3VLConfig.from_hf(path / "hf"), model.architecture):
        raise ValueError(f"{path} does not fit the model: it has {different}")


def differences(found: Qwen3VLConfig, wanted: Qwen3VLConfig) -> str:
    """What of two architectures is not alike; empty if they are."""
    values = vars(wanted)
    return "; ".join(
        f"{name} {value}, not {values[name]}"
        for name, value in vars(found).items()
        if value != values[name]
    )


def _weights(model: Qwen3VLModel) -> dict[int, Any]:
    """Each chunk's, which repeat each other's names, but not those that they are saved under."""
    metadata = {"dp_cp_group": model.parallel.groups.dp_cp}
    return {i: c.sharded_state_dict(metadata=metadata) for i, c in enumerate(model.chunks)}


def _optimizer_parts(optimizer: Any, weights: dict[int, Any]) -> list[OptimizerState]:
    """megatron.core chains several where experts are spread over ranks."""
    if optimizer is None:
        return []
    return [OptimizerState(part, weights) for part in optimizer.chained_optimizers]


def _to_write(model: Qwen3VLModel, optimizer: Any, scheduler: Any) -> dict[str, Any]:
    weights = _weights(model)
    state: dict[str, Any] = {"model": weights}
    if parts := _optimizer_parts(optimizer, weights):
        state["optimizer"] = {
            "step": max(part.step for part in parts),
            "parts": {i: part.to_write() for i, part in enumerate(parts)},
        }
        state["scheduler"] = scheduler.state_dict()
    entries = [entry for chunk in weights.values() for entry in chunk.values()]
    for entry in entries:
        if is_rounded(entry.data):
            entry.data = model.read_weight(entry.data)
    _share_out(entries, model.parallel.groups)
    return state


def _share_out(entries: list[Any], groups: ProcessGroupCollection) -> None:
    """Have data-parallel ranks write about as many bytes each of the weights that all of them
    hold, where megatron.core has the first one write all. They agree without a word, since they
    hold the same tensors in the same order."""
    written = {group: [0] * group.size() for group in (groups.dp_cp, groups.expt_dp)}
    # objects are small; a replica of other model-parallel ranks is written by those
    tensors = [e for e in entries if not isinstance(e, ShardedObject) and not any(e.replica_id[:2])]
    # the largest first, so that small ones fill up what they leave uneven
    for entry in sorted(tensors, key=lambda e: e.data.nbytes, reverse=True):
        group = groups.expt_dp if EXPERTS in entry.key else groups.dp_cp
        bytes_of = written[group]
        writer = bytes_of.index(min(bytes_of))
        bytes_of[writer] += entry.data.nbytes
        entry.replica_id = (0, 0, int(writer != group.rank()))


def _keep(chunk: nn.Module, weights: dict[str, Tensor]) -> None:
    """What parameters in FP8 were loaded from, for an optimizer to come."""
    for name, parameter in chunk.named_parameters():
        if is_rounded(parameter):
            keep(parameter, weights[name])
