"""Logical tensors: what a model calls one parameter, however it is flattened and spread over ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from am_lightning.distributed.names import group_names
from am_lightning.distributed.shard import ShardInfo
from am_lightning.distributed.strategies import STRATEGIES, Strategy, Surroundings, local, redistributed_grad


@dataclass(frozen=True, eq=False)
class LogicalParam:
    """One logical tensor: this process's shard of it, and whether that shard counts in the reduced sums.

    Attributes:
        param: the parameter that the optimizer has, which may be a flat one of several tensors.
        group_index: of its parameter group; not the group itself, because load_state_dict replaces the dicts.
        name: distinct among all.
        shard: where its elements live among the ranks.
        strategy: what has placed it.
        is_owner: this rank's elements count in the sums; False where another rank counts them.
        span: its elements in this rank's part of ``param``; None: all of them.
    """

    param: Tensor
    group_index: int
    name: str
    shard: ShardInfo
    strategy: type[Strategy]
    is_owner: bool = True
    span: slice | None = None

    @property
    def partitioned(self) -> bool:
        """It has its own adaptive scalars within a flat parameter, kept by name."""
        return self.strategy.partitioned


def logical_params_of(
    param_groups: Sequence[dict[str, Any]],
    *,
    surroundings: Surroundings | None = None,
    known_names: dict[int, str] | None = None,
) -> tuple[list[LogicalParam], list[int]]:
    """The logical tensors in the order of the groups, and how many each group has. Not collective.

    A parameter that a group has twice (a tied weight; torch.optim warns of it) is one tensor, under its first name.

    Args:
        known_names: ``id(parameter) -> name``.

    Raises:
        ValueError: a parameter is placed so that its sums cannot be formed.
    """
    names = group_names(param_groups, known_names)
    strategies = [kind(surroundings or Surroundings()) for kind in STRATEGIES]
    found: list[LogicalParam] = []
    sizes: list[int] = []
    for g, group in enumerate(param_groups):
        before = len(found)
        named: dict[int, tuple[Tensor, str]] = {}
        for param, name in zip(group["params"], names[g], strict=True):
            named.setdefault(id(param), (param, name))
        for param, name in named.values():
            strategy = next(one for one in strategies if one.holds(param))
            for part in strategy.slices(param, name, g):
                found.append(LogicalParam(param, g, part.name, part.shard, type(strategy), span=part.span))
        sizes.append(len(found) - before)
    return found, sizes


def local_shard(logical: LogicalParam, tensor: Tensor) -> Tensor:
    """This rank's elements of ``tensor`` (the parameter, its gradient or a state of it): a view."""
    tensor = local(tensor)
    return tensor if logical.span is None else tensor[logical.span]


def local_grad(logical: LogicalParam) -> Tensor:
    """This rank's elements of the gradient, placed like the parameter."""
    return local_shard(logical, redistributed_grad(logical.param))
