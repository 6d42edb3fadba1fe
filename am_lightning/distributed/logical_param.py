"""Find the logical tensors in an optimizer's parameters, and this process's elements of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from am_lightning.distributed import strategies
from am_lightning.distributed.names import group_names
from am_lightning.distributed.strategies import LogicalParam, Surroundings, local, redistributed_grad


def logical_params_of(
    param_groups: Sequence[dict[str, Any]],
    *,
    surroundings: Surroundings | None = None,
    known_names: dict[int, str] | None = None,
) -> tuple[list[LogicalParam], list[int]]:
    """Return the logical tensors in the order of the groups, and their number in each group. Not collective.

    A parameter that a group has twice (a tied weight, of which torch.optim warns) is one tensor under its first name.

    Args:
        param_groups: parameter groups of the optimizer.
        surroundings: the model and the replaced parameters. Default: none are known.
        known_names: ``id(parameter) -> name`` of parameters that were given without a name.

    Raises:
        ValueError: if the placement of a parameter does not allow its sums to be formed.
    """
    names = group_names(param_groups, known_names)
    kinds = [kind(surroundings or Surroundings()) for kind in strategies.STRATEGIES]
    found: list[LogicalParam] = []
    sizes: list[int] = []
    for g, group in enumerate(param_groups):
        before = len(found)
        named: dict[int, tuple[Tensor, str]] = {}
        for param, name in zip(group["params"], names[g], strict=True):
            named.setdefault(id(param), (param, name))
        for param, name in named.values():
            strategy = next(one for one in kinds if one.holds(param))
            for part in strategy.slices(param, name, g):
                found.append(LogicalParam(param, g, part.name, part.shard, type(strategy), span=part.span))
        sizes.append(len(found) - before)
    return found, sizes


def local_shard(logical: LogicalParam, tensor: Tensor) -> Tensor:
    """Return a view of this rank's elements of ``tensor``, which is the parameter, its gradient or a state of it."""
    tensor = local(tensor)
    return tensor if logical.span is None else tensor[logical.span]


def local_grad(logical: LogicalParam) -> Tensor:
    """Return this rank's elements of the gradient, placed like the parameter."""
    return local_shard(logical, redistributed_grad(logical.param))
