"""The backend seam: device, collectives, layer kernels and precision, chosen once at start.

Nothing else asks where it runs. What a backend can do is data (`Abilities`), compared with the
configuration before a model is built, and known where its device is not.
"""

from __future__ import annotations

import os
import platform
import resource
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from torch import Tensor

from model_providers.parallel import ParallelState


@dataclass(frozen=True)
class Abilities:
    """What a backend can do."""

    name: str
    dtype: torch.dtype
    moe_dispatcher: str
    fp8: bool
    """Whether its linear layers can compute in FP8."""
    fused_kernels: bool
    """Whether gated activations and weight-gradient accumulation have kernels of their own."""
    recompute_modules: frozenset[str]
    """Modules of a decoder layer whose activations it can recompute one by one."""
    activation_offload: bool
    """Whether a decoder layer's activations can lie in host memory until its backward pass."""
    async_collectives: bool
    """Whether a collective can run beside the computation."""


ABILITIES = {
    "cpu": Abilities(
        name="cpu",
        dtype=torch.float32,
        # alltoall wants CUDA streams
        moe_dispatcher="allgather",
        fp8=False,
        fused_kernels=False,
        # megatron.core's recomputation of norms and activations wants Transformer Engine
        recompute_modules=frozenset({"core_attn", "mlp", "moe"}),
        activation_offload=False,
        async_collectives=False,
    ),
    "cuda": Abilities(
        name="cuda",
        dtype=torch.bfloat16,
        moe_dispatcher="alltoall",
        fp8=True,
        fused_kernels=True,
        recompute_modules=frozenset({"core_attn", "mlp", "moe", "layernorm", "moe_act"}),
        activation_offload=True,
        async_collectives=True,
    ),
}


@dataclass(frozen=True)
class Backend(Abilities):
    """Where models run and out of what they are built."""

    device: torch.device
    process_group_backend: str
    layers: BackendSpecProvider
    cross_entropy: Callable[[Tensor, Tensor, dist.ProcessGroup], Tensor]
    """(logits [T, vocab / tensor], labels [T], tensor group) -> -log p(labels) [T] in fp32; may
    overwrite the logits."""

    def to_device(self, host: Tensor) -> Tensor:
        """The same on the device; the host does not wait for the copy."""
        staged = host.pin_memory() if self.device.type == "cuda" else host
        return staged.to(self.device, non_blocking=True)

    def synchronize(self) -> None:
        """Wait for what is queued on the current stream."""
        if self.device.type == "cuda":
            torch.cuda.current_stream().synchronize()

    def side_stream(self) -> torch.Stream | None:
        """A queue of work beside the current one; None where nothing is queued."""
        return torch.Stream(self.device) if self.device.type == "cuda" else None

    def release_cached(self) -> None:
        """Give the device the memory that torch keeps for tensors to come."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def device_uuid(self) -> str:
        """Name of this rank's device, the same in every process of the host."""
        if self.device.type == "cuda":
            return f"GPU-{torch.cuda.get_device_properties(self.device).uuid}"
        return f"CPU-{os.getpid()}"

    def device_name(self) -> str:
        """Model of this rank's device."""
        if self.device.type == "cuda":
            return str(torch.cuda.get_device_properties(self.device).name)
        return platform.processor() or platform.machine()

    def peak_memory(self) -> int:
        """Most bytes that torch had allocated on this rank's device at a time since
        reset_peak_memory; on a CPU most that the process ever had."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def reset_peak_memory(self) -> None:
        """Start counting anew, where the device counts."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def shareable(self, nbytes: int) -> Tensor:
        """[nbytes] uint8 on the device, which another process can map."""
        if self.device.type != "cuda":
            return torch.empty(nbytes, dtype=torch.uint8).share_memory_()
        # another process can't map expandable segments without privileges
        expandable = any(
            "expandable_segments:True" in os.environ.get(name, "")
            for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
        )
        if expandable:
            torch.cuda.memory._set_allocator_settings("expandable_segments:False")
        try:
            return torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        finally:
            if expandable:
                torch.cuda.memory._set_allocator_settings("expandable_segments:True")

    def init_process_group(self, timeout_seconds: float = 600) -> None:
        """Join the world that torchrun or srun started; a lone process is a world of one.

        ValueError if torchrun could not start the ranks again as it is asked to.
        """
        if dist.is_initialized():
            return
        _check_restarts()
        if "RANK" not in os.environ:
            os.environ.update(
                RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0"
            )
        if self.device.type == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group(
            self.process_group_backend, timeout=timedelta(seconds=timeout_seconds)
        )
        # the one piece of megatron.core's global state that its layers need: a scratch buffer
        parallel_state._set_global_memory_buffer()

    def seed(self, seed: int, parallel: ParallelState) -> None:
        """Seed torch and megatron.core's model-parallel random states."""
        torch.manual_seed(seed)
        model_parallel_cuda_manual_seed(
            seed,
            tp_rank=parallel.tensor_rank,
            ep_rank=parallel.groups.ep.rank(),
            etp_rank=parallel.groups.expt_tp.rank(),
        )


def _check_restarts() -> None:
    """torchrun keeps its store for the ranks that it starts again, and they would look for their
    dead predecessors at the addresses that are in it."""
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")
    if restarts != "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise ValueError(
            f"torchrun --max-restarts {restarts} needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its "
            "environment: ranks that are started again do not find each other otherwise"
        )


def create(name: str) -> Backend:
    """The backend of that name: "cpu" (gloo, torch layers, fp32) or "cuda" (NCCL, Transformer
    Engine layers, BF16).

    Raises:
        ValueError: "cuda" without a GPU or without a Transformer Engine that loads.
    """
    builders: dict[str, Any] = {"cpu": _cpu, "cuda": _cuda}
    if name not in builders:
        raise ValueError(f"backend {name!r} is not one of {sorted(builders)}")
    return builders[name]()


def _cpu() -> Backend:
    from model_providers import megatron_cpu
    from model_providers.cpu_layers import TorchSpecProvider, cross_entropy

    megatron_cpu.apply()
    return Backend(
        **vars(ABILITIES["cpu"]),
        device=torch.device("cpu"),
        process_group_backend="gloo",
        layers=TorchSpecProvider(),
        cross_entropy=cross_entropy,
    )


def _cuda() -> Backend:
    if not torch.cuda.is_available():
        raise ValueError("backend 'cuda' needs a GPU and none is visible; use backend=cpu here")
    try:
        import transformer_engine.pytorch  # noqa: F401
    except (ImportError, OSError) as error:
        raise ValueError(
            f"backend 'cuda' needs a Transformer Engine that loads: {error}. Install the pinned "
            "version (constraints-gpu.txt) and see `prism-megatron doctor`."
        ) from error
    from model_providers.te_layers import (
        TransformerEngineSpecProvider,
        cross_entropy,
        use_fused_norm,
    )

    use_fused_norm()
    return Backend(
        **vars(ABILITIES["cuda"]),
        device=torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))),
        process_group_backend="nccl",
        layers=TransformerEngineSpecProvider(),
        cross_entropy=cross_entropy,
    )
