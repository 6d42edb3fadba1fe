"""Rows (one for each logical tensor) and the packed all-reduce that serves all of them."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from am_lightning.distributed.consistency import check_agreement, check_stages
from am_lightning.distributed.names import group_names
from am_lightning.distributed.shard import (
    Groups,
    LogicalParam,
    ShardInfo,
    backend_device,
    my_rank,
    ranks_of,
    shown,
    smallest_groups,
    unsharded,
    world_size,
)
from am_lightning.distributed.strategies import dtensor, fsdp1
from am_lightning.distributed.strategies.deepspeed_zero import FlatSlice

UNKNOWN_REPLICAS = (
    "torch.distributed is initialised with {world} processes, the parameters are not sharded, and replica_group is not "
    "set: beta_t is computed on each process alone, and replicas whose sums differ in the last bit (other thread "
    "counts, other GPUs) drift apart. Pass replica_group=torch.distributed.group.WORLD to the optimizer, or add the "
    "AdaptiveMemory() callback, which does so under DDP."
)


@dataclass(frozen=True, eq=False)
class Reduction:
    """Rows that are summed over the same ranks.

    Attributes:
        groups: process groups that do it, one after the other.
        rows: indices.
        ranks: all of one replica that hold parts or copies of them.
        replicas: how many such sets of ranks there are.
    """

    groups: Groups
    rows: tuple[int, ...]
    ranks: frozenset[int]
    replicas: int = 1


class ShardLayout:
    """The rows of an optimizer, in the order of its parameter groups, and how their sums are reduced.

    Built once, at the first step, by every rank together; then ``all_reduce`` costs one collective a step.

    Attributes:
        logical_params: one for each logical tensor, the same on every rank.
        reductions: usually one.
        sizes: rows of each parameter group.
        sizes_known: every element is counted once; False for FSDP1 without its model, where only ratios are sure.
        others_hold_the_rest: other ranks have other tensors, whole (ZeroRedundancyOptimizer).
    """

    def __init__(
        self,
        rows: Sequence[LogicalParam],
        reductions: Sequence[Reduction],
        sizes: Sequence[int],
        pipeline_group: Any = None,
        *,
        others_hold_the_rest: bool = False,
    ) -> None:
        self.logical_params = list(rows)
        self.reductions = list(reductions)
        self.sizes = list(sizes)
        self.pipeline_group = pipeline_group
        self.others_hold_the_rest = others_hold_the_rest
        self.sizes_known = not any(
            fsdp1.is_managed(row.param) and row.shard.numel is None for row in self.logical_params
        )
        self.holds_whole_tensors = not any(p.span is not None or dtensor.is_dtensor(p.param) for p in rows)
        self._constants: dict[torch.device, tuple[Tensor, list[Tensor]]] = {}

    @classmethod
    def build(
        cls,
        rows: Sequence[LogicalParam],
        sizes: Sequence[int],
        *,
        replica_group: Any = None,
        pipeline_group: Any = None,
        others_hold_the_rest: bool = False,
    ) -> ShardLayout:
        """Find how the rows of ``logical_params_of`` are reduced. Collective: all ranks that share them come together.

        Args:
            replica_group: ranks that hold the same parameters, as far as their meshes do not say so.
            pipeline_group: ranks that hold the other stages of the model.
            others_hold_the_rest: each rank holds other tensors, whole (ZeroRedundancyOptimizer).

        Raises:
            ValueError: groups and meshes do not match, ranks disagree on the rows, or pieces do not add up; on every
                rank alike.
        """
        reductions = _reductions(list(rows), replica_group)
        _check_pipeline(reductions, pipeline_group)
        replica = 0 if replica_group is None else dist.get_rank(replica_group)
        counted = {i: _is_owner_here(rows[i], r.ranks, replica) for r in reductions for i in r.rows}
        settled = [replace(row, is_owner=counted.get(i, True)) for i, row in enumerate(rows)]
        layout = cls(settled, reductions, sizes, pipeline_group, others_hold_the_rest=others_hold_the_rest)
        layout._agree()
        if not (reductions or pipeline_group or others_hold_the_rest) and world_size() > 1:
            warnings.warn(UNKNOWN_REPLICAS.format(world=world_size()), stacklevel=4)
        return layout

    def all_reduce(self, packed: Tensor, shared: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Sum over ranks, in one collective for each reduction's process group (usually one in all).

        Args:
            packed: ``[rows, k]``, this rank's contributions. Finite numbers of rows that do not count here are dropped;
                others are not, so that a fault in one copy alone is seen by all ranks.
            shared: ``[m]``, numbers in which every rank counts.

        Returns:
            Both, summed: the same bits on every rank.
        """
        if not self.reductions:
            return packed, shared
        uncounted, indices = self._on(packed.device)
        packed = packed.masked_fill(uncounted & packed.isfinite(), 0)
        if len(self.reductions) == 1:
            part, shared = self._reduce(packed, shared, self.reductions[0].groups)
            return part, shared
        packed = packed.clone()
        for reduction, index in zip(self.reductions, indices, strict=True):
            first = reduction is self.reductions[0]
            part, summed = self._reduce(packed[index], shared if first else None, reduction.groups)
            packed[index] = part
            shared = summed if first else shared
        return packed, shared

    @staticmethod
    def _reduce(packed: Tensor, shared: Tensor | None, groups: Groups) -> tuple[Tensor, Tensor | None]:
        vector = packed.flatten() if shared is None else torch.cat([packed.flatten(), shared])
        for group in groups:
            vector = summed(vector, group)
        head, tail = vector[: packed.numel()], vector[packed.numel() :]
        return head.view_as(packed), None if shared is None else tail

    def _on(self, device: torch.device) -> tuple[Tensor, list[Tensor]]:
        """``[rows, 1]`` bool, True where another rank counts this piece; the rows of each reduction."""
        if device not in self._constants:
            mask = torch.tensor([[not row.is_owner] for row in self.logical_params], device=device)
            self._constants[device] = mask, [torch.tensor(r.rows, device=device) for r in self.reductions]
        return self._constants[device]

    def stage_reduction(self) -> Callable[[Tensor], Tensor] | None:
        """``reduce_over_stages`` where there is a pipeline."""
        return None if self.pipeline_group is None else self.reduce_over_stages

    def reduce_over_stages(self, totals: Tensor) -> Tensor:
        """Sum numbers that are already those of a stage over the stages of the pipeline."""
        return totals if self.pipeline_group is None else summed(totals, self.pipeline_group)

    def check_whole_model(self, what: str) -> None:
        """Refuse what needs the whole model where ranks beyond the reductions may hold other parts of it.

        Raises:
            ValueError: naming ``what``, the ranks and the cure; on every rank alike.
        """
        if self.others_hold_the_rest:
            raise ValueError(
                f"{what} cannot be formed inside ZeroRedundancyOptimizer: each rank's optimizer sees only that rank's "
                "tensors, and is stepped without the others. Use scope='tensor' (and torch.nn.utils.clip_grad_norm_: "
                "every rank has all gradients), or FSDP"
            )
        stages = 1 if self.pipeline_group is None else dist.get_world_size(self.pipeline_group)
        for reduction in self.reductions:
            covered = len(reduction.ranks) * reduction.replicas * stages
            if covered != world_size():
                row = self.logical_params[reduction.rows[0]]
                raise ValueError(
                    f"{what} needs the whole model, but the {len(reduction.ranks)} ranks that hold parameter "
                    f"{row.name!r}, {row.shard.description}, are not all {world_size()} of the world. Where the others "
                    "hold copies (DDP), pass replica_group; where they hold other pipeline stages, set "
                    "optimizer.pipeline_group to the group of one rank from each stage; scope='tensor' needs neither"
                )

    def check_stages(self, description: str) -> None:
        """Collective over the pipeline. Refuse stages whose numbers would not match when they are pooled.

        Args:
            description: what all stages must have alike.

        Raises:
            ValueError: on every rank of the pipeline.
        """
        if self.pipeline_group is not None:
            device = self.logical_params[0].param.device if self.logical_params else torch.device("cpu")
            check_stages(description, self.pipeline_group, device)

    @property
    def collectives(self) -> int:
        """All-reduces of one step."""
        return sum(len(reduction.groups) for reduction in self.reductions) + (self.pipeline_group is not None)

    def describe(self) -> str:
        """One line for logs: rows, elements, placements, collectives a step."""
        elements = sum(local_shard(row, row.param).numel() for row in self.logical_params)
        text = f"{len(self.logical_params)} tensors, {elements:,} elements on this rank"
        if not self.reductions:
            return f"{text}; no reduction: this process holds every element"
        kinds = Counter(row.shard.description for row in self.logical_params)
        placed = ", ".join(f"{count} {description}" for description, count in kinds.items())
        how = "; ".join(f"{len(r.rows)} x 4 numbers over {len(r.ranks) * r.replicas} ranks" for r in self.reductions)
        many = "s" if self.collectives > 1 else ""
        return f"{text} ({placed}); {self.collectives} all-reduce{many} a step: {how}"

    def _agree(self) -> None:
        """Collective. Refuse rows that differ between ranks or whose pieces do not add up, on every rank alike."""
        for reduction in self.reductions:
            rows = [self.logical_params[i] for i in reduction.rows]
            held = [local_shard(row, row.param).numel() if row.is_owner else 0 for row in rows]
            check_agreement(rows, held, reduction.groups)


def logical_params_of(
    param_groups: Sequence[dict[str, Any]],
    *,
    model: nn.Module | None = None,
    known_names: dict[int, str] | None = None,
    partitions: dict[int, list[FlatSlice]] | None = None,
) -> tuple[list[LogicalParam], list[int]]:
    """Rows in the order of the groups, and how many each group has. Not collective.

    A parameter that a group has twice (a tied weight; torch.optim warns of it) is one row, under its first name.

    Args:
        model: the FSDP1 module, whose handles know the process groups.
        known_names: ``id(parameter) -> name``.
        partitions: ``id(flat parameter) -> parts``, of DeepSpeed's.

    Raises:
        ValueError: a parameter is placed so that its sums cannot be formed.
    """
    names = group_names(param_groups, known_names)
    managed = fsdp1.managed_parameters(model)
    rows: list[LogicalParam] = []
    sizes: list[int] = []
    for g, group in enumerate(param_groups):
        before = len(rows)
        named: dict[int, tuple[Any, str]] = {}
        for param, name in zip(group["params"], names[g], strict=True):
            named.setdefault(id(param), (param, name))
        for param, name in named.values():
            if partitions and id(param) in partitions:
                for part in partitions[id(param)]:
                    rows.append(LogicalParam(param, g, part.name, part.shard, span=part.span, partitioned=True))
            elif dtensor.is_dtensor(param):
                rows.append(LogicalParam(param, g, name, dtensor.shard_info_of(param, name)))
            elif fsdp1.is_managed(param):
                known = managed.get(id(param)) or fsdp1.without_model(param)
                for inner, numel, span in known.parts:
                    rows.append(LogicalParam(param, g, inner or name, replace(known.shard, numel=numel), span=span))
            else:
                rows.append(LogicalParam(param, g, name, unsharded(param)))
        sizes.append(len(rows) - before)
    return rows, sizes


def local_shard(row: LogicalParam, tensor: Tensor) -> Tensor:
    """This rank's elements of ``tensor`` (the row's parameter, its gradient or a state of it): a view."""
    tensor = dtensor.local(tensor)
    return tensor if row.span is None else tensor[row.span]


def local_grad(row: LogicalParam) -> Tensor:
    """This rank's elements of the row's gradient, placed like the parameter."""
    return local_shard(row, dtensor.redistributed_grad(row.param))


def summed(vector: Tensor, group: Any) -> Tensor:
    """All-reduce on a device that the group's backend serves: offloaded parameters live on a CPU beside NCCL.

    ``vector`` is the caller's to lose: where it is on that device already, it is overwritten.
    """
    there = vector.to(backend_device(group, vector.device))
    try:
        dist.all_reduce(there, group=group)
    except RuntimeError as error:  # gloo's timeout; NCCL's ends the process from a thread of its own
        raise type(error)(f"{error}\n{_NOT_ALL_RANKS}") from error
    return there.to(vector.device)


_NOT_ALL_RANKS = (
    "This was the all-reduce of the optimizer's sums, which all ranks that share them must enter: did another rank "
    "fail, or leave out this step()? A GradScaler that looks at one rank's gradients only does: see Troubleshooting"
)


def _is_owner_here(row: LogicalParam, ranks: frozenset[int], replica: int) -> bool:
    """Each element once: the first replica's, within it the slice of ``ranks`` that holds its first rank."""
    return replica == 0 and row.shard.is_owner and min(ranks) in row.shard.ranks


def _reductions(rows: list[LogicalParam], replica_group: Any) -> list[Reduction]:
    """Rows by the ranks over which they are summed: as few sets as possible, the largest shard first."""
    replicas = frozenset([my_rank()]) if replica_group is None else ranks_of(replica_group)
    sets = _reduction_sets([row.shard for row in rows])
    result = []
    for ranks, groups, members in sets:
        if not members or len(ranks) * len(replicas) == 1:
            continue
        if len(ranks) > 1 and len(replicas) > 1 and ranks & replicas != {my_rank()}:
            raise ValueError(
                f"replica_group has ranks {shown(replicas)}, of which {shown(ranks & replicas)} are in the mesh of "
                f"{rows[members[0]].name!r}, {rows[members[0]].shard.description}: replicas within a mesh are known "
                "from it. Leave replica_group out, or give it the ranks that hold the same shard in other meshes"
            )
        chain = smallest_groups(ranks, groups)
        if len(replicas) > 1:
            whole = len(ranks) * len(replicas) == world_size()
            chain = (dist.group.WORLD,) if whole else (*chain, replica_group)
        result.append(Reduction(chain, tuple(members), ranks, len(replicas)))
    return result


def _check_pipeline(reductions: list[Reduction], pipeline_group: Any) -> None:
    """A pipeline group has one rank of this stage: this one."""
    stages = frozenset([my_rank()]) if pipeline_group is None else ranks_of(pipeline_group)
    for reduction in reductions:
        same = stages & reduction.ranks.union(*(ranks_of(group) for group in reduction.groups))  # copies too
        if same != {my_rank()}:
            raise ValueError(
                f"pipeline_group has ranks {shown(stages)}, of which {shown(same)} hold the same stage's parameters: "
                "give it one rank of each stage"
            )


def _reduction_sets(shards: list[ShardInfo]) -> list[tuple[frozenset[int], Any, list[int]]]:
    """(ranks, their groups, indices of shards): every shard in the first universe that holds its ranks."""
    distinct: dict[frozenset[int], ShardInfo] = {}
    for shard in shards:
        distinct.setdefault(shard.ranks, shard)
    largest = [shard for shard in distinct.values() if not any(shard.ranks < other for other in distinct)]
    sets: list[tuple[frozenset[int], Any]] = [(shard.ranks, shard.groups) for shard in largest]
    if len(largest) > 1 and all(shard.mesh is not None for shard in largest):
        cover = dtensor.span_of_root([shard.mesh for shard in largest])
        if cover is not None:
            ranks, mesh = cover
            sets = [(ranks, lambda: dtensor.mesh_groups(mesh))]
    members: list[list[int]] = [[] for _ in sets]
    for i, shard in enumerate(shards):
        place = next(u for u, (ranks, _) in enumerate(sets) if shard.ranks <= ranks)
        members[place].append(i)
    return [(ranks, groups, chosen) for (ranks, groups), chosen in zip(sets, members, strict=True)]
