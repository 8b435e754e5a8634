"""One model in training: forward-backward over packed micro-batches, optimizer step, inference.

    sequences --plan--> micro-batches of each data-parallel rank, and who encodes which image
        --> megatron.core schedule
        --> loss_fn(output, batch) -> (loss already divided by global counts, metric sums)
        --> gradients summed over data-parallel ranks --> clip --> AdamW

This is the only caller of megatron.core's forward-backward function. Losses come divided by counts
over the whole step, gradients are only ever summed, so neither depends on how the step is split
into micro-batches, data-parallel ranks or pipeline stages.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise, tee
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker
from torch import Tensor

from checkpoint_tools import megatron_directory
from model_providers import context, fp8_weights
from model_providers.qwen3_vl import Qwen3VLModel
from prism_megatron.config import schema
from prism_megatron.config.schema import Optimizer
from prism_megatron.data.image_plan import feature_rows, plan_images
from prism_megatron.data.packing import pack, packed_length, plan_micro_batches
from prism_megatron.flops import training_flops
from prism_megatron.phases import count, phase
from prism_megatron.training.gradient_overlap import reduce_in_order
from prism_megatron.training.guard import Guard, Unsound, UnsoundInference
from prism_megatron.training.host_state import HostState
from prism_megatron.training.main_weights import MainWeights
from prism_megatron.training.optimizer import build_optimizer, build_scheduler, update
from prism_megatron.training.watchdog import reached
from prism_megatron.types import ImageShare, PackedBatch, Sequence, VisualInputs

LossFn = Callable[[Tensor, PackedBatch], tuple[Tensor, dict[str, Tensor]]]
"""(model output [T], micro-batch) -> (loss, sums to add up over the step)."""

# of buffers, which it then computes as anybody would
logging.getLogger("megatron.core.distributed.distributed_data_parallel").addFilter(
    lambda record: "full_param_layout not provided" not in record.getMessage()
)

NOT_FINITE = "micro-batches with a loss that is not finite"

ExtractFn = Callable[[Tensor, PackedBatch], list[Tensor]]
"""(model output [T], micro-batch) -> one result a sequence."""


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did: metric sums over the whole batch, gradient norm, rate used;
    some are not finite where the guard had the update skipped."""

    sums: dict[str, float]
    grad_norm: float
    lr: float


class ModelRunner:
    """A model with its optimizer and its layout; every rank of the world calls every method."""

    def __init__(
        self,
        model: Qwen3VLModel,
        *,
        micro_batch_tokens: int,
        pad_id: int,
        optimizer: Optimizer | None,
        steps: int = 0,
        mrope: bool = True,
        guard: schema.Guard | None = None,
    ) -> None:
        """Wrap a model whose weights are loaded.

        micro_batch_tokens: most tokens of a packed row; pad_id: token that fills rows up;
        steps: length of the learning-rate schedule; mrope: see pack; guard: of updates, the default
        one if None. Without an optimizer the model only infers.
        """
        self.model, self.guard = model, Guard(guard or schema.Guard())
        self.micro_batch_tokens, self.pad_id, self.mrope = micro_batch_tokens, pad_id, mrope
        self.parallel = model.parallel
        self.ddp: list[DistributedDataParallel] = []
        self._has_scales = self._is_checked = False
        self._recorded: list[list[Tensor]] | None = None
        self.loads = torch.zeros(0)
        if optimizer is None:
            model.requires_grad_(False)
            return
        self.ddp = _wrap(model)
        if optimizer.offload:
            # main weights are on the device before they are on the host
            self.release()
        self.optimizer = build_optimizer(optimizer, self.ddp, model)
        self.scheduler = build_scheduler(optimizer, self.optimizer, steps)
        fp8_weights.forget(model)
        host = HostState(self.optimizer, model.backend) if optimizer.offload else None
        self._state = host.on_host if host else nullcontext
        model.read_weight = MainWeights(self.optimizer, host).read

    @phase("train")
    def train_step(
        self, sequences: list[Sequence], loss_fn: LossFn, loads: Tensor | None = None
    ) -> StepResult:
        """One optimizer step over all sequences of the step, which every rank passes alike.

        loads: see forward_backward. Raises Unsound, with nothing updated, where the guard says so.
        """
        assert self.ddp, "this runner has no optimizer"
        self._count(sequences)
        self.model.train()
        for chunk in self.ddp:
            chunk.restore_grad_buffers(synchronize=False)
        if not self._has_scales:
            # Gradients are far below what FP8 holds without a scale, so the first updates would be
            # lost. One pass finds the scales of the last products of attention and MLP, a second
            # those of the products before, which get no gradient until then.
            for _ in range(2 if self.model.lacks_gradient_scales() else 0):
                self.forward_backward(sequences, loss_fn, loads)
            self._has_scales = True
        for chunk in self.ddp:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        read = self._forward_backward(sequences, loss_fn, loads)
        reached("an update")
        # Without a loss scale, which BF16 has not, megatron.core's step checks nothing: a norm that
        # is not finite would make every weight and moment so.
        self.optimizer.prepare_grads()
        grad_norm = float(self.optimizer.get_grad_norm())
        # after all that the device still has to do, so that it is waited for once
        sums, problem = read()
        watched = {"grad_norm": grad_norm} | ({"loss": sums["loss"]} if "loss" in sums else {})
        problem = problem or self.guard.judge(watched)
        if self._on_any_rank(bool(problem)):
            self.guard.refuse(problem or "another rank found it unsound")
            return StepResult(sums, grad_norm, 0.0)
        self.guard.accept(watched)
        # before the update, so that a warm-up does not begin with a step at rate zero
        self.scheduler.step(increment=1)
        rate = float(self.optimizer.param_groups[0]["lr"])
        updated = update(self.optimizer, grad_norm)
        assert updated, "nothing but the guard leaves updates out"
        return StepResult(sums, grad_norm, rate)

    def _count(self, sequences: list[Sequence]) -> None:
        """What the step computes, as MFU counts it: each image once."""
        shown = {v.key: v.grid_thw for s in sequences for v in (*s.images, *s.videos)}
        lengths = [len(sequence) for sequence in sequences]
        has_head = self.model.head == "language"
        flops = training_flops(self.model.architecture, lengths, shown.values(), has_head)
        count("train_tokens", sum(lengths))
        count("train_tflop", flops.total / 1e12)

    def release(self) -> None:
        """Give the device the memory that only an update needs, gradients and what the allocator
        keeps for activations; the next train_step takes it again."""
        self.model.backend.synchronize()
        for chunk in self.ddp:
            chunk.offload_grad_buffers(synchronize=False, empty_cache=False)
        self.model.backend.release_cached()

    def save(self, path: Path, hf: Path) -> None:
        """Write a training checkpoint; hf: directory whose config and processor go with it."""
        self.begin_save(path, hf).finish()

    def begin_save(
        self, path: Path, hf: Path, in_background: bool = False
    ) -> megatron_directory.Saving:
        """The same up to its `finish`; in_background: see Saving."""
        check, self._is_checked = not self._is_checked, True
        with self._state():
            return megatron_directory.Saving(
                path, self.model, hf, self.optimizer, self.scheduler, in_background, check
            )

    def load(self, path: Path) -> None:
        """Go on from a training checkpoint, of this layout or another.

        Raises ValueError if it does not fit the model.
        """
        with self._state():
            if self.scheduler is not None:
                # megatron.core adds the checkpoint's position to what there is, as after a rewind
                self.scheduler.num_steps = 0
            megatron_directory.load(path, self.model, self.optimizer, self.scheduler)

    @torch.no_grad()
    def infer(self, sequences: list[Sequence], extract: ExtractFn) -> list[Tensor]:
        """One result a sequence, in order, on every rank; nothing is trained or dropped out.

        `loads` then has what forward_backward wants to know of the experts. Raises
        UnsoundInference, on all ranks alike, if a result is not finite.
        """
        self.model.eval()
        plan = self._plan(sequences)
        found: dict[int, Tensor] = {}
        order = iter(plan[self.parallel.data_rank])

        def collect(output: Tensor, batch: PackedBatch) -> tuple[Tensor, dict[str, Tensor]]:
            found.update(zip(next(order), extract(output, batch), strict=True))
            return output.sum(), {}

        self._run(sequences, plan, collect, forward_only=True)
        self.loads = self._take_loads()
        results = self._share(found, len(sequences))
        for index, result in enumerate(results):
            if not bool(result.isfinite().all()):
                raise UnsoundInference(
                    f"sequence {index} of {len(sequences)} ({len(sequences[index])} tokens) gives "
                    "NaN or infinity; its input or the weights are broken"
                )
        return results

    def infer_with_routes(
        self, sequences: list[Sequence], extract: ExtractFn
    ) -> tuple[list[Tensor], list[Tensor]]:
        """As infer, and the experts that each sequence's tokens took: [L, layers, k] uint8 or int16
        of the expert layers of this rank's pipeline stage, for Sequence.routes."""
        self._recorded = [[] for _ in self.model.chunks]
        self.model.record_routes(True)
        try:
            results = self.infer(sequences, extract)
        finally:
            self.model.record_routes(False)
            recorded, self._recorded = self._recorded, None
        rows = self._plan(sequences)[self.parallel.data_rank]
        found: dict[int, Tensor] = {}
        for members, parts in zip(rows, zip(*recorded, strict=True), strict=True):
            bounds = [0, *accumulate(len(sequences[i]) for i in members)]
            row = torch.cat(parts, dim=1)
            found.update((i, row[a:b]) for i, (a, b) in zip(members, pairwise(bounds), strict=True))
        gathered: list[Any] = [None] * self.parallel.data_size
        dist.all_gather_object(gathered, found, group=self.parallel.groups.dp)
        merged = {index: routes for part in gathered for index, routes in part.items()}
        return results, [merged[i] for i in range(len(sequences))]

    def _record_routes(self, wrapped: Any, batch: PackedBatch) -> None:
        """Keep what a chunk's routers chose in the micro-batch that it has just passed."""
        assert self._recorded is not None
        chunk = getattr(wrapped, "module", wrapped)
        small = torch.uint8 if self.model.architecture.num_experts <= 256 else torch.int16
        routes = chunk.routes
        if routes is None:
            # a chunk with the embedding alone has no router
            routes = torch.zeros(len(batch.input_ids), 0, self.model.architecture.top_k)
        self._recorded[list(self.model.chunks).index(chunk)].append(routes.to(small).cpu())

    def _share(self, found: dict[int, Tensor], count: int) -> list[Tensor]:
        """Results of all data-parallel ranks, from the last pipeline stage to every rank."""
        merged: dict[int, Tensor] = {}
        gathered: list[Any] = [None] * self.parallel.data_size
        dist.all_gather_object(gathered, found, group=self.parallel.groups.dp)
        for part in gathered:
            merged.update(part)
        if self.parallel.layout.pipeline > 1:
            box = [merged]
            dist.broadcast_object_list(
                box, src=self.parallel.last_stage_rank, group=self.parallel.groups.pp
            )
            merged = box[0]
        assert len(merged) == count, f"{len(merged)} results for {count} sequences"
        return [merged[i] for i in range(count)]

    def _plan(self, sequences: list[Sequence]) -> list[list[list[int]]]:
        layout = self.parallel.layout
        lengths = [len(s) for s in sequences]
        return plan_micro_batches(
            lengths,
            # without their images: the ranks share those out by cost themselves, and wait for each
            # other's features before the decoder begins
            costs=[self.model.architecture.work(length) for length in lengths],
            dp_size=self.parallel.data_size,
            max_tokens=self.micro_batch_tokens,
            # the interleaved schedule sends as many micro-batches as there are stages through one
            # virtual stage after the other
            multiple=layout.pipeline if layout.virtual_pipeline > 1 else 1,
        )

    def _micro_batches(
        self, sequences: list[Sequence], plan: list[list[list[int]]]
    ) -> Iterator[PackedBatch]:
        """This rank's micro-batches, each packed, and its images preprocessed, by a thread while
        the one before is computed."""
        with ThreadPoolExecutor(1, "packer") as packer:
            rows = [
                [[sequences[j] for j in members[i]] for members in plan]
                for i in range(len(plan[self.parallel.data_rank]))
            ]
            names = tuple(sequences[0].per_token)
            ahead = packer.submit(self._pack, rows[0], names)
            for following in [*rows[1:], None]:
                reached("a micro-batch")
                batch = ahead.result()
                if following is not None:
                    ahead = packer.submit(self._pack, following, names)
                yield batch.to(self.model.backend.device)

    def _pack(self, rows: list[list[Sequence]], per_token: tuple[str, ...]) -> PackedBatch:
        """This rank's of the data-parallel ranks' rows that run at the same time. They are equally
        long where experts are spread, since their tokens are gathered over these ranks."""
        layout, architecture = self.parallel.layout, self.model.architecture
        sequence_multiple = context.sequence_multiple(layout.context)
        multiple = self.model.precision.row_multiple * sequence_multiple
        multiple *= layout.tensor if layout.sequence_parallel else 1
        longest = max(packed_length(row, multiple, sequence_multiple) for row in rows)
        own = rows[self.parallel.data_rank]
        return pack(
            own,
            image_token_id=architecture.image_token_id,
            video_token_id=architecture.video_token_id,
            merge_size=architecture.vision.spatial_merge_size,
            pad_id=self.pad_id,
            pad_multiple=multiple,
            sequence_multiple=sequence_multiple,
            pad_to=longest if layout.expert * layout.expert_tensor > 1 else None,
            per_token=per_token,
            images=self._image_share(rows),
            mrope=self.mrope,
        )

    def _image_share(self, rows: list[list[Sequence]]) -> ImageShare:
        """This rank's share in the images of the data-parallel ranks' `rows`."""
        vision = self.model.architecture.vision
        # tensor-parallel ranks with a tower each show the same images, of which each encodes some
        towers = self.parallel.layout.towers
        share = plan_images(
            [shown for row in rows for shown in self._shown(row) for _ in range(towers)],
            self.parallel.features.rank(),
            work=vision.work,
            merge_size=vision.spatial_merge_size,
        )
        # later stages get the features with the hidden states
        return share if self.parallel.is_first_stage else replace(share, encoded=())

    def _shown(self, row: list[Sequence]) -> list[list[VisualInputs]]:
        """The images and videos of which each context-parallel rank holds a token."""
        ranks, architecture = self.parallel.layout.context, self.model.architecture
        if ranks == 1:
            return [[visual for s in row for visual in (*s.images, *s.videos)]]
        shown: list[list[VisualInputs]] = [[] for _ in range(ranks)]
        for s in row:
            chunk = torch.tensor(-(-len(s) // context.sequence_multiple(ranks)))
            for token, visuals in (
                (architecture.image_token_id, s.images),
                (architecture.video_token_id, s.videos),
            ):
                holders, _ = context.owner((s.input_ids == token).nonzero()[:, 0], chunk, ranks)
                for visual in visuals:
                    rows = feature_rows(visual, architecture.vision.spatial_merge_size)
                    for rank in set(holders[:rows].tolist()):
                        shown[rank].append(visual)
                    holders = holders[rows:]
        return shown

    def _set_router_loss_scale(self, tokens: int) -> None:
        """Router losses are sums over tokens, of which megatron.core leaves the division to us."""
        if not self.model.architecture.num_experts:
            return
        # one element, as in the default that megatron.core copies into the same tensor
        scale = torch.tensor([1.0 / tokens], device=self.model.backend.device)
        self.model.config.moe_grad_scale_func = lambda: scale

    def forward_backward(
        self, sequences: list[Sequence], loss_fn: LossFn, loads: Tensor | None = None
    ) -> dict[str, float]:
        """Add the step's gradients to the buffers, reduced over the ranks; metric sums.

        loads: `loads` of an inference over the same sequences with the same weights, for the
        experts' load-balancing loss; where they are needed and not given it is made. Raises Unsound
        if a loss is not finite.
        """
        sums, problem = self._forward_backward(sequences, loss_fn, loads)()
        if problem:
            raise Unsound(problem)
        return sums

    def _forward_backward(
        self, sequences: list[Sequence], loss_fn: LossFn, loads: Tensor | None
    ) -> Callable[[], tuple[dict[str, float], str]]:
        """The same up to its result, for which one waits by a call; instead of raising it says what
        is wrong, on all ranks alike."""
        plan = self._plan(sequences)
        # one for the process, whose entries have as many layers as the first model that recorded
        destroy_moe_metrics_tracker()
        tokens = sum(map(len, sequences))
        self._set_router_loss_scale(tokens)
        if self.model.config.moe_aux_loss_coeff:
            self.model.set_step_loads(self._count_loads(sequences) if loads is None else loads)
        collected = self._run(sequences, plan, loss_fn, forward_only=False)
        sums: dict[str, Tensor] = {}
        for part in collected:
            for name, value in part.items():
                sums[name] = sums.get(name, 0.0) + value.double()

        def read() -> tuple[dict[str, float], str]:
            reduced = self._reduce(sums)
            problem = ""
            if broken := reduced.pop(NOT_FINITE):
                count = len(plan[0]) * self.parallel.data_size
                problem = (
                    f"the loss is NaN or infinite in {broken:.0f} of {count} micro-batches; its "
                    "inputs or the weights are broken"
                )
            return reduced | self._router_metrics(tokens) | self._load_entropy(), problem

        return read

    def _on_any_rank(self, mine: bool) -> bool:
        flag = torch.tensor(float(mine), device=self.model.backend.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)

    def _reduce(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """Metric sums over data-parallel ranks, from the last stage to all ranks."""
        box: list[Any] = [list(sums)]
        dist.broadcast_object_list(
            box, src=self.parallel.last_stage_rank, group=self.parallel.groups.pp
        )
        names = box[0]
        zero = torch.zeros((), dtype=torch.float64, device=self.model.backend.device)
        values = torch.stack([sums.get(name, zero) for name in names])
        dist.all_reduce(values, group=self.parallel.groups.dp)
        dist.broadcast(values, src=self.parallel.last_stage_rank, group=self.parallel.groups.pp)
        return dict(zip(names, values.tolist(), strict=False))

    def _count_loads(self, sequences: list[Sequence]) -> Tensor:
        """What an update by a router's loss needs to know first; see forward_backward."""
        self.infer(sequences, lambda output, batch: [output.new_zeros(())] * batch.num_sequences)
        self.model.train()
        return self.loads

    def _take_loads(self) -> Tensor:
        """Tokens of all ranks that took each expert since the last call, [routers, E]."""
        loads = self.model.take_expert_loads()
        # a stage with the embedding alone has no router
        if loads.numel():
            dist.all_reduce(loads, group=self.parallel.groups.tp_dp_cp)
        return loads

    def _router_metrics(self, tokens: int) -> dict[str, float]:
        """Mean over layers of the load-balancing loss; top_k when balanced."""
        if not self.model.config.moe_aux_loss_coeff:
            return {}
        found = self.model.take_balance()
        if len(found):
            dist.all_reduce(found, group=self.parallel.groups.tp_dp_cp)
        total = found.sum()
        dist.all_reduce(total, group=self.parallel.groups.pp)
        architecture = self.model.architecture
        mean = total / (tokens * architecture.num_layers)
        return {"aux_loss": float(mean) * architecture.top_k}

    def _load_entropy(self) -> dict[str, float]:
        """How evenly the step's tokens spread over the experts: the entropy of their shares, mean
        over layers, 1 when balanced and 0 when one expert gets all."""
        experts, groups = self.model.architecture.num_experts, self.parallel.groups
        if not experts:
            return {}
        loads = self._take_loads()
        shares = loads / loads.sum(-1, keepdim=True).clamp(min=1)
        entropy = -torch.special.xlogy(shares, shares).sum() / math.log(experts)
        total = torch.stack([entropy, entropy.new_tensor(len(loads))])
        dist.all_reduce(total, group=groups.pp)
        return {"load_entropy": float(total[0] / total[1])}

    def _run(
        self,
        sequences: list[Sequence],
        plan: list[list[list[int]]],
        loss_fn: LossFn,
        forward_only: bool,
    ) -> list[dict[str, Tensor]]:
        """megatron.core's schedule over the micro-batches; loss_fn runs on the last stage only."""

        def forward_step(iterator: Iterator[PackedBatch], model: Any) -> tuple[Tensor, Any]:
            batch = next(iterator)

            def loss(output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
                value, sums = loss_fn(output, batch)
                # looked at after the step: a look now would make the host wait for the device
                sums[NOT_FINITE] = (~value.detach().isfinite()).float()
                # the count is unused: losses are already divided (see finalize below)
                return value, torch.zeros((), dtype=torch.int), sums

            output = model(batch)
            if self._recorded is not None:
                self._record_routes(model, batch)
            return output, loss

        groups = self.parallel.groups
        pipeline, virtual = self.parallel.layout.pipeline, self.parallel.layout.virtual_pipeline
        schedule = get_forward_backward_func(
            pp_size=pipeline, vp_size=virtual if virtual > 1 else None
        )
        chunks = self.ddp or list(self.model.chunks)
        return schedule(
            forward_step_func=forward_step,
            # every chunk sees the same micro-batches
            data_iterator=list(tee(self._micro_batches(sequences, plan), len(chunks))),
            model=chunks,
            num_microbatches=len(plan[self.parallel.data_rank]),
            seq_length=1,
            micro_batch_size=1,
            forward_only=forward_only,
            pg_collection=groups,
            p2p_communicator=P2PCommunicator(groups.pp, self.model.config)
            if pipeline > 1
            else None,
        )


def _sum_over_encoders(model: Qwen3VLModel) -> None:
    """Sum the gradients of a replicated tower over the tensor-parallel ranks, of which each has
    those of the images that it encoded; in place, as they are reduced over the data-parallel ranks.
    """
    trained = [p for p in model.vision_model.parameters() if p.requires_grad]
    group = model.parallel.groups.tp
    sums = [dist.all_reduce(p.main_grad, group=group, async_op=True) for p in trained]
    for each in sums:
        each.wait()


def _wrap(model: Qwen3VLModel) -> list[DistributedDataParallel]:
    def finalize(models: list[Any], num_tokens: Tensor | None, **kwargs: Any) -> None:
        # None: gradients are already those of the normalised loss
        finalize_model_grads(models, None, **kwargs)
        if model.parallel.layout.towers > 1 and model.parallel.is_first_stage:
            _sum_over_encoders(model)

    model.config.finalize_model_grads_func = finalize
    overlap = model.backend.async_collectives
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=overlap,
        use_distributed_optimizer=True,
        fp8_param_gather=model.precision.param_gather,
    )
    wrapped = [
        DistributedDataParallel(chunk.config, settings, chunk, pg_collection=model.parallel.groups)
        for chunk in model.chunks
    ]
    if overlap:
        # gradients of all but the last micro-batch only add up
        no_sync = [chunk.no_sync for chunk in wrapped]
        model.config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
        for chunk in wrapped:
            reduce_in_order(chunk.bucket_groups)
            reduce_in_order(chunk.expert_parallel_bucket_groups)
    return wrapped
