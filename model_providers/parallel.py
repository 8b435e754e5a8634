"""One model's parallel layout and its process groups.

Policy and discriminator live on the same ranks with layouts of their own, so no group is global:
every megatron.core call gets the ProcessGroupCollection of its model.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Literal

import torch.distributed as dist
from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.process_groups_config import ProcessGroupCollection


@dataclass(frozen=True)
class Layout:
    """Sizes of one model's parallel dimensions; data parallel is what is left of the world.

    tensor x context x pipeline x data = world for attention and dense layers;
    expert_tensor x expert x pipeline x expert_data = world for the experts.
    """

    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1
    context: int = 1
    expert: int = 1
    expert_tensor: int = 1
    sequence_parallel: bool = False
    first_stage_layers: int | None = None
    last_stage_layers: int | None = None
    """Decoder layers of the first and the last pipeline stage; the others share the rest evenly."""
    embedding_as_layer: bool = False
    loss_as_layer: bool = False
    """The embedding (with the vision tower) takes a layer's place on the first stage, the head and
    the loss take one on the last."""
    vision: Literal["sharded", "replicated"] = "sharded"
    """Tensor-parallel ranks split the tower's matrices, or each has all of it for images of its
    own."""

    @property
    def vision_tensor(self) -> int:
        """Tensor-parallel ranks that split the vision tower."""
        return self.tensor if self.vision == "sharded" else 1

    @property
    def towers(self) -> int:
        """Copies of the vision tower on the tensor-parallel ranks, each for images of its own."""
        return self.tensor // self.vision_tensor

    def data(self, world: int) -> int:
        """Data-parallel size at `world` ranks; ValueError if that does not divide."""
        return _quotient(
            world, {"tensor": self.tensor, "pipeline": self.pipeline, "context": self.context}
        )

    def expert_data(self, world: int) -> int:
        """Data-parallel size of the experts at `world` ranks."""
        return _quotient(
            world,
            {
                "expert_tensor": self.expert_tensor,
                "expert": self.expert,
                "pipeline": self.pipeline,
            },
        )


def _quotient(world: int, factors: dict[str, int]) -> int:
    product = 1
    for size in factors.values():
        product *= size
    if world % product:
        terms = " * ".join(f"{name}={size}" for name, size in factors.items())
        raise ValueError(
            f"Parallel layout {terms} needs a multiple of {product} ranks, but the world has "
            f"{world}. Start {product * max(1, world // product)} ranks or lower one of the sizes."
        )
    return world // product


@dataclass(frozen=True)
class ParallelState:
    """A layout with the process groups that this rank belongs to."""

    layout: Layout
    groups: ProcessGroupCollection
    alone: dist.ProcessGroup
    """The group of this rank only."""
    features: dist.ProcessGroup
    """The ranks to exchange image features among: those of dp_cp, context parallel fastest, or with
    a replicated tower those of tp_dp_cp, tensor parallel fastest. A group of its own, since others
    reduce gradients beside the backward pass: where the exchange of a backward pass comes between
    these reductions differs from rank to rank."""

    @classmethod
    def create(cls, layout: Layout, timeout: timedelta | None = None) -> ParallelState:
        """Build the groups; every rank of the world calls this, in the same order for each model.

        Rank order is Megatron's: tensor fastest, then context, data, pipeline. timeout: that of
        their collectives, which torch does not take from the world's; None: torch's own.
        """
        world = dist.get_world_size()
        data, expert_data = layout.data(world), layout.expert_data(world)
        grid = HyperCommGrid(
            [layout.tensor, layout.context, data, layout.pipeline], ["tp", "cp", "dp", "pp"]
        )
        grid.register_view(
            "expert",
            [layout.expert_tensor, layout.expert, expert_data, layout.pipeline],
            ["expt_tp", "ep", "expt_dp", "pp"],
            shared_dims=["pp"],
        )
        create = partial(grid.create_pg, timeout=timeout)
        groups = ProcessGroupCollection(
            tp=create("tp"),
            cp=create("cp"),
            pp=create("pp"),
            dp=create("dp"),
            mp=create(["tp", "pp"]),
            tp_cp=create(["tp", "cp"]),
            dp_cp=create(["cp", "dp"]),
            tp_dp_cp=create(["tp", "cp", "dp"]),
            ep=create("ep", view="expert"),
            expt_tp=create("expt_tp", view="expert"),
            expt_dp=create("expt_dp", view="expert"),
            tp_ep=create(["expt_tp", "ep"], view="expert"),
            tp_ep_pp=create(["expt_tp", "ep", "pp"], view="expert"),
        )
        groups.intra_dp_cp = groups.dp_cp
        groups.intra_expt_dp = groups.expt_dp
        # one optimizer instance spans the world
        groups.intra_dist_opt = dist.group.WORLD
        groups.embd = _embedding_group(groups.pp, timeout)
        groups.pos_embd = None
        alone, _ = dist.new_subgroups(group_size=1, timeout=timeout)
        replicated = layout.vision == "replicated"
        sharing = ["tp", "cp", "dp"] if replicated else ["cp", "dp"]
        features, _ = dist.new_subgroups_by_enumeration(
            grid.get_rank_enum(sharing), timeout=timeout
        )
        place = groups.dp.rank() * layout.context + groups.cp.rank()
        if replicated:
            place = place * layout.tensor + groups.tp.rank()
        assert features.rank() == place
        return cls(layout, groups, alone, features)

    @property
    def vision_groups(self) -> ProcessGroupCollection:
        """The groups as the vision tower sees them, which lives whole on one pipeline stage and
        whose work context-parallel ranks do not split, nor tensor-parallel ones if it is
        replicated."""
        groups = ProcessGroupCollection(**vars(self.groups))
        groups.pp = groups.cp = self.alone
        if self.layout.vision == "replicated":
            groups.tp = self.alone
        return groups

    @property
    def tensor_rank(self) -> int:
        return self.groups.tp.rank()

    @property
    def data_rank(self) -> int:
        return self.groups.dp.rank()

    @property
    def data_size(self) -> int:
        return self.groups.dp.size()

    @property
    def pipeline_rank(self) -> int:
        return self.groups.pp.rank()

    @property
    def is_first_stage(self) -> bool:
        return self.pipeline_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pipeline_rank == self.layout.pipeline - 1

    @property
    def last_stage_rank(self) -> int:
        """World rank that holds the last pipeline stage next to this rank."""
        return dist.get_process_group_ranks(self.groups.pp)[-1]


def _embedding_group(
    pipeline: dist.ProcessGroup, timeout: timedelta | None
) -> dist.ProcessGroup | None:
    """First and last stage of this rank's pipeline, which share tied embeddings.

    None on ranks of the stages between.
    """
    pipelines: list[list[int]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(pipelines, dist.get_process_group_ranks(pipeline))
    mine = None
    for ranks in sorted(set(map(tuple, pipelines))):
        ends = sorted({ranks[0], ranks[-1]})
        group = dist.new_group(ends, timeout=timeout)
        if dist.get_rank() in ends:
            mine = group
    return mine
