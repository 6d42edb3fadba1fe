"""Rows (one for each logical tensor) and the packed all-reduce that serves all of them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from am_lightning.names import group_names

UNKNOWN_REPLICAS = (
    "torch.distributed is initialised with {world} processes, the parameters are not sharded, and replica_group is not "
    "set: beta_t is computed on each process alone, and replicas whose sums differ in the last bit (other thread "
    "counts, other GPUs) drift apart. Pass replica_group=torch.distributed.group.WORLD to the optimizer, or add the "
    "AdaptiveMemory() callback, which does so under DDP."
)


@dataclass(frozen=True, eq=False)
class Row:
    """One logical tensor: this process's piece of it, and whether that piece counts in the reduced sums."""

    param: Tensor
    group_index: int  # not the group itself: load_state_dict replaces the dicts
    name: str
    counted: bool = True


@dataclass(frozen=True, eq=False)
class Reduction:
    """One all-reduce: the process group, and what it is for (words for :meth:`Layout.describe`)."""

    group: Any
    reason: str


class Layout:
    """The rows of an optimizer, in the order of its parameter groups, and how their sums are reduced.

    Built once, at the first step, by every rank together; then :meth:`all_reduce` costs one collective a step.
    """

    def __init__(self, rows: Sequence[Row], reductions: Sequence[Reduction], sizes: Sequence[int]) -> None:
        self.rows = list(rows)
        self.reductions = list(reductions)
        self.sizes = list(sizes)  # rows of each group
        self._uncounted: Tensor | None = None

    @classmethod
    def build(
        cls,
        param_groups: Sequence[dict[str, Any]],
        *,
        replica_group: Any = None,
        known_names: dict[int, str] | None = None,
    ) -> Layout:
        """Lay out ``param_groups``. Collective: every rank of ``replica_group`` calls it at the same step.

        Raises:
            ValueError: a parameter is sharded in a way whose sums cannot be formed.
        """
        names = group_names(param_groups, known_names)
        rows, reductions, counted = [], [], True
        if replica_group is not None and dist.get_world_size(replica_group) > 1:
            counted = dist.get_rank(replica_group) == 0
            reductions.append(Reduction(replica_group, "replicas take the first rank's sums"))
        elif replica_group is None and _world_size() > 1:
            warnings.warn(UNKNOWN_REPLICAS.format(world=_world_size()), stacklevel=4)
        for g, group in enumerate(param_groups):
            for param, name in zip(group["params"], names[g], strict=True):
                _refuse_sharded(param, name)
                rows.append(Row(param, g, name, counted))
        return cls(rows, reductions, [len(group["params"]) for group in param_groups])

    def all_reduce(self, packed: Tensor, shared: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Sum over ranks in one collective.

        Args:
            packed: ``[rows, k]``, this rank's contributions; rows that do not count here are dropped, not multiplied by
                zero (NaN * 0 is NaN).
            shared: ``[m]``, numbers in which every rank counts.

        Returns:
            Both, summed: the same bits on every rank.
        """
        if not self.reductions:
            return packed, shared
        packed = packed.masked_fill(self._mask(packed.device), 0)
        vector = packed.flatten() if shared is None else torch.cat([packed.flatten(), shared])
        for reduction in self.reductions:
            dist.all_reduce(vector, group=reduction.group)
        head, tail = vector[: packed.numel()], vector[packed.numel() :]
        return head.view_as(packed), None if shared is None else tail

    def describe(self) -> str:
        """One line for logs: rows, elements, collectives a step."""
        elements = sum(row.param.numel() for row in self.rows)
        text = f"{len(self.rows)} tensors, {elements:,} elements on this rank"
        if not self.reductions:
            return f"{text}; no reduction: this process holds every element"
        how = "; ".join(f"{r.reason} ({dist.get_world_size(r.group)} ranks)" for r in self.reductions)
        return f"{text}; {len(self.reductions)} all-reduce of {len(self.rows)} x 4 numbers a step: {how}"

    def _mask(self, device: torch.device) -> Tensor:
        """``[rows, 1]`` bool, True where this rank's piece is a copy that another rank counts."""
        if self._uncounted is None or self._uncounted.device != device:
            self._uncounted = torch.tensor([[not row.counted] for row in self.rows], device=device)
        return self._uncounted


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _refuse_sharded(param: Tensor, name: str) -> None:
    if type(param).__name__ == "DTensor" or getattr(param, "_fsdp_flattened", False):
        raise ValueError(
            f"parameter {name!r} is sharded ({type(param).__name__}): this release sums over plain parameters and DDP "
            "replicas only. Use strategy='ddp' or one process."
        )
