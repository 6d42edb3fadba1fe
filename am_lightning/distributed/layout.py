"""Reduce the sums of all logical tensors over ranks in one packed all-reduce."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from am_lightning.distributed import strategies
from am_lightning.distributed.consistency import check_agreement, check_stages
from am_lightning.distributed.logical_param import local_shard
from am_lightning.distributed.shard import (
    Groups,
    ShardInfo,
    backend_device,
    my_rank,
    ranks_of,
    shown,
    smallest_groups,
    world_size,
)
from am_lightning.distributed.strategies import LogicalParam

NUMBERS, BYTES = 4, 8  # numbers of a logical tensor in the packed vector (N, D, present, first), bytes of a float64

UNKNOWN_REPLICAS = (
    "torch.distributed is initialised with {world} processes, the parameters are not sharded, and replica_group is not "
    "set: beta_t is computed on each process alone, and replicas whose sums differ in the last bit (other thread "
    "counts, other GPUs) drift apart. Pass replica_group=torch.distributed.group.WORLD to the optimizer, or add the "
    "AdaptiveMemory() callback, which does so under DDP."
)


@dataclass(frozen=True, eq=False)
class Reduction:
    """Logical tensors that are summed over the same ranks.

    Attributes:
        groups: process groups, reduced over one after the other.
        members: indices of the logical tensors.
        ranks: all ranks of one replica that hold parts or copies of them.
        replicas: number of replicas.
    """

    groups: Groups
    members: tuple[int, ...]
    ranks: frozenset[int]
    replicas: int = 1


class ShardLayout:
    """The logical tensors of an optimizer, in the order of its parameter groups, and how their sums are reduced.

    All ranks build it together at the first step. After that, ``all_reduce`` costs one collective a step.

    Attributes:
        logical_params: the logical tensors, the same on every rank.
        reductions: the reductions, usually one.
        sizes: number of logical tensors of each parameter group.
        sizes_known: whether every element is counted once. False if copies cannot be told from shards, so that only
            ratios of sums are exact.
        others_hold_the_rest: whether other ranks hold other tensors as a whole (ZeroRedundancyOptimizer).
    """

    def __init__(
        self,
        params: Sequence[LogicalParam],
        reductions: Sequence[Reduction],
        sizes: Sequence[int],
        pipeline_group: Any = None,
        *,
        others_hold_the_rest: bool = False,
    ) -> None:
        self.logical_params = list(params)
        self.reductions = list(reductions)
        self.sizes = list(sizes)
        self.pipeline_group = pipeline_group
        self.others_hold_the_rest = others_hold_the_rest
        self.sizes_known = all(logical.shard.numel is not None for logical in self.logical_params)
        self.holds_whole_tensors = all(local_shard(p, p.param) is p.param for p in self.logical_params)
        self._positions: tuple[Sequence[str], Tensor] | None = None
        self.stage_reduction = None if pipeline_group is None else self.reduce_over_stages
        self.partitioned = any(logical.partitioned for logical in self.logical_params)
        self._constants: dict[torch.device, tuple[Tensor, list[Tensor]]] = {}

    @classmethod
    def build(
        cls,
        params: Sequence[LogicalParam],
        sizes: Sequence[int],
        *,
        replica_group: Any = None,
        pipeline_group: Any = None,
        others_hold_the_rest: bool = False,
    ) -> ShardLayout:
        """Build the reductions of the sums of ``params``. Collective over all ranks that share tensors.

        Args:
            params: the logical tensors of the optimizer.
            sizes: number of logical tensors of each parameter group.
            replica_group: process group of the ranks that hold the same parameters, if their meshes do not contain this
                information. Default: None.
            pipeline_group: process group of one rank of each pipeline stage. Default: None.
            others_hold_the_rest: whether other ranks hold other tensors as a whole (ZeroRedundancyOptimizer).

        Raises:
            ValueError: on every rank, if groups and meshes do not match, ranks hold different tensors, or shards do not
                add up.
        """
        reductions = _reductions(list(params), replica_group)
        _check_pipeline(reductions, pipeline_group)
        replica = 0 if replica_group is None else dist.get_rank(replica_group)
        owned = {i: _is_owner_here(params[i].shard, r.ranks, replica) for r in reductions for i in r.members}
        params = [
            p if owned.get(i, True) == p.is_owner else replace(p, is_owner=not p.is_owner) for i, p in enumerate(params)
        ]
        layout = cls(params, reductions, sizes, pipeline_group, others_hold_the_rest=others_hold_the_rest)
        layout._agree()
        if not (reductions or pipeline_group or others_hold_the_rest) and world_size() > 1:
            warnings.warn(UNKNOWN_REPLICAS.format(world=world_size()), stacklevel=5)
        return layout

    def all_reduce(self, packed: Tensor, shared: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Sum over ranks, in one collective for each reduction's process group (usually one in all).

        Args:
            packed: ``[params, k]`` contributions of this rank. Finite numbers of tensors that another rank counts are
                dropped. Other numbers are kept, so that all ranks see a fault in a single copy.
            shared: ``[m]`` numbers to which every rank contributes. Default: None.

        Returns:
            The sums of both, which are the same bits on every rank.
        """
        if not self.reductions:
            return packed, shared
        uncounted, indices = self._on(packed.device)
        packed = packed.masked_fill(uncounted & packed.isfinite(), 0)
        if len(self.reductions) == 1:
            return self._reduce(packed, shared, self.reductions[0].groups)
        packed = packed.clone()
        for reduction, index in zip(self.reductions, indices, strict=True):
            first = reduction is self.reductions[0]
            packed[index], total = self._reduce(packed[index], shared if first else None, reduction.groups)
            shared = total if first else shared
        return packed, shared

    @staticmethod
    def _reduce(packed: Tensor, shared: Tensor | None, groups: Groups) -> tuple[Tensor, Tensor | None]:
        vector = packed.flatten() if shared is None else torch.cat([packed.flatten(), shared])
        for group in groups:
            vector = all_reduce(vector, group)
        head, tail = vector[: packed.numel()], vector[packed.numel() :]
        return head.view_as(packed), None if shared is None else tail

    def _on(self, device: torch.device) -> tuple[Tensor, list[Tensor]]:
        """Return a ``[params, 1]`` mask of tensors that another rank counts, and the members of each reduction."""
        if device not in self._constants:
            mask = torch.tensor([[not logical.is_owner] for logical in self.logical_params], device=device)
            self._constants[device] = mask, [torch.tensor(r.members, device=device) for r in self.reductions]
        return self._constants[device]

    def reduce_over_stages(self, totals: Tensor) -> Tensor:
        """Sum the totals of each stage over the stages of the pipeline."""
        return totals if self.pipeline_group is None else all_reduce(totals, self.pipeline_group)

    def check_whole_model(self, what: str) -> None:
        """Check that the reductions cover the whole model.

        Args:
            what: the quantity that needs the whole model, for the message.

        Raises:
            ValueError: on every rank, if ranks outside the reductions may hold other parts of the model.
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
                logical = self.logical_params[reduction.members[0]]
                raise ValueError(
                    f"{what} needs the whole model, but the {len(reduction.ranks)} ranks that hold parameter "
                    f"{logical.name!r}, {logical.shard.description}, are not all {world_size()} of the world. Where "
                    "the others hold copies (DDP), pass replica_group; where they hold other pipeline stages, set "
                    "optimizer.pipeline_group to the group of one rank from each stage; scope='tensor' needs neither"
                )

    def check_exact(self, what: str) -> None:
        """Check that the reductions count each element of the whole model once.

        Args:
            what: the quantity that needs it, for the message.

        Raises:
            ValueError: on every rank, if elements may be missing, or copies of them are not known.
        """
        self.check_whole_model(what)
        strategies.check_exact(self.logical_params)

    def check_stages(self, description: str) -> None:
        """Check that the sums of all pipeline stages match. Collective over the pipeline.

        Args:
            description: description of the settings that must be the same on all stages.

        Raises:
            ValueError: on every rank of the pipeline, if ``description`` differs.
        """
        if self.pipeline_group is not None:
            device = self.logical_params[0].param.device if self.logical_params else torch.device("cpu")
            check_stages(description, self.pipeline_group, device)

    def positions_in(self, names: Sequence[str]) -> Tensor:
        """Return the position of each of the layout's tensors in ``names``, on the device of the first parameter."""
        if self._positions is None or self._positions[0] != names:
            place = {name: i for i, name in enumerate(names)}
            device = self.logical_params[0].param.device
            found = torch.tensor([place[logical.name] for logical in self.logical_params], device=device)
            self._positions = names, found
        return self._positions[1]

    @property
    def collectives(self) -> int:
        """Number of all-reduces in a step."""
        return sum(len(reduction.groups) for reduction in self.reductions) + (self.pipeline_group is not None)

    def describe(self) -> str:
        """Return the tensors, elements, placements and collectives of a step as one line for logs."""
        elements = sum(local_shard(logical, logical.param).numel() for logical in self.logical_params)
        text = f"{len(self.logical_params)} tensors, {elements:,} elements on this rank"
        if not self.reductions:
            return f"{text}; no reduction: this process holds every element"
        kinds = Counter(logical.shard.description for logical in self.logical_params)
        placed = ", ".join(f"{count} {description}" for description, count in kinds.items())
        how = "; ".join(f"{len(r.members)} x 4 numbers over {len(r.ranks) * r.replicas} ranks" for r in self.reductions)
        many = "s" if self.collectives > 1 else ""
        return f"{text} ({placed}); {self.collectives} all-reduce{many} a step: {how}"

    def _agree(self) -> None:
        """Raise on every rank if tensors differ between ranks or shards do not add up. Collective."""
        for reduction in self.reductions:
            params = [self.logical_params[i] for i in reduction.members]
            numels = [local_shard(logical, logical.param).numel() if logical.is_owner else 0 for logical in params]
            check_agreement(params, numels, reduction.groups)


def message_bytes(tensors: int) -> int:
    """Return the size of a step's packed vector in bytes."""
    return tensors * NUMBERS * BYTES


def all_reduce(vector: Tensor, group: Any) -> Tensor:
    """All-reduce on a device that the group's backend supports, because NCCL cannot reduce offloaded CPU parameters.

    ``vector`` is overwritten if it is on that device already.
    """
    there = vector.to(backend_device(group, vector.device))
    try:
        dist.all_reduce(there, group=group)
    except RuntimeError as error:  # gloo's timeout; NCCL's timeout ends the process from another thread
        raise type(error)(f"{error}\n{_NOT_ALL_RANKS}") from error
    return there.to(vector.device)


_NOT_ALL_RANKS = (
    "This was the all-reduce of the optimizer's sums, which all ranks that share them must enter: did another rank "
    "fail, or leave out this step()? A GradScaler that looks at one rank's gradients only does: see Troubleshooting"
)


def _is_owner_here(shard: ShardInfo, ranks: frozenset[int], replica: int) -> bool:
    """Return whether this rank counts the shard: in the first replica, and in the slice with the first of ``ranks``."""
    return replica == 0 and shard.is_owner and min(ranks) in shard.ranks


def _reductions(params: list[LogicalParam], replica_group: Any) -> list[Reduction]:
    """Group logical tensors by the ranks over which they are summed, into as few reductions as possible."""
    replicas = frozenset([my_rank()]) if replica_group is None else ranks_of(replica_group)
    result = []
    for ranks, groups, members in _reduction_sets([logical.shard for logical in params]):
        if not members or len(ranks) * len(replicas) == 1:
            continue
        if len(ranks) > 1 and len(replicas) > 1 and ranks & replicas != {my_rank()}:
            example = params[members[0]]
            raise ValueError(
                f"replica_group has ranks {shown(replicas)}, of which {shown(ranks & replicas)} are in the mesh of "
                f"{example.name!r}, {example.shard.description}: replicas within a mesh are known "
                "from it. Leave replica_group out, or give it the ranks that hold the same shard in other meshes"
            )
        in_turn = smallest_groups(ranks, groups)
        if len(replicas) > 1:
            whole = len(ranks) * len(replicas) == world_size()
            in_turn = (dist.group.WORLD,) if whole else (*in_turn, replica_group)
        result.append(Reduction(in_turn, tuple(members), ranks, len(replicas)))
    return result


def _check_pipeline(reductions: list[Reduction], pipeline_group: Any) -> None:
    """Raise an error if the pipeline group has other ranks of this stage."""
    stages = frozenset([my_rank()]) if pipeline_group is None else ranks_of(pipeline_group)
    for reduction in reductions:
        same = stages & reduction.ranks.union(*(ranks_of(group) for group in reduction.groups))  # copies too
        if same != {my_rank()}:
            raise ValueError(
                f"pipeline_group has ranks {shown(stages)}, of which {shown(same)} hold the same stage's parameters: "
                "give it one rank of each stage"
            )


def _reduction_sets(shards: list[ShardInfo]) -> list[tuple[frozenset[int], Any, list[int]]]:
    """Return (ranks, their groups, indices of shards). Each shard is in the first set that contains its ranks."""
    distinct: dict[frozenset[int], ShardInfo] = {}
    for shard in shards:
        distinct.setdefault(shard.ranks, shard)
    largest = [shard for shard in distinct.values() if not any(shard.ranks < other for other in distinct)]
    covered = strategies.cover(largest) if len(largest) > 1 else None
    sets = [(shard.ranks, shard.groups) for shard in largest] if covered is None else [covered]
    members: list[list[int]] = [[] for _ in sets]
    for i, shard in enumerate(shards):
        members[next(u for u, (ranks, _) in enumerate(sets) if shard.ranks <= ranks)].append(i)
    return [(ranks, groups, chosen) for (ranks, groups), chosen in zip(sets, members, strict=True)]
