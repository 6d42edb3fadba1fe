"""The strategies that distribute parameters over ranks, one module each, and functions that query all of them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from torch import nn

from am_lightning.distributed.given_params import GivenParams, ParamGroups
from am_lightning.distributed.shard import ShardInfo
from am_lightning.distributed.strategies.deepspeed_zero import ZeroStrategy
from am_lightning.distributed.strategies.dtensor import (
    DTensorStrategy,
    describe_placement,
    local,
    placement_of,
    redistributed_grad,
)
from am_lightning.distributed.strategies.fsdp1 import FSDP1Strategy
from am_lightning.distributed.strategies.strategy import Cover, Demand, LogicalParam, Strategy, Surroundings
from am_lightning.distributed.strategies.unsharded import UnshardedStrategy

__all__ = [
    "STRATEGIES",
    "Demand",
    "LogicalParam",
    "Strategy",
    "Surroundings",
    "averaging_group",
    "check_demand",
    "check_engines",
    "check_exact",
    "cover",
    "describe_placement",
    "is_stepped_by_engine",
    "loaded_engines",
    "local",
    "logical_ndims",
    "placement_of",
    "redistributed_grad",
]

# A parameter belongs to the first strategy whose holds() is true.
STRATEGIES: tuple[type[Strategy], ...] = (
    ZeroStrategy,  # before the others: its flat partitions look like plain tensors
    DTensorStrategy,
    FSDP1Strategy,
    UnshardedStrategy,  # takes every tensor
)


def loaded_engines() -> list[type[Strategy]]:
    """Return the strategies whose engine is imported, so that it may replace given parameters by flat partitions."""
    return [strategy for strategy in STRATEGIES if strategy.engine in sys.modules]


def is_stepped_by_engine(param_groups: ParamGroups) -> bool:
    """Return whether an engine up the stack steps the optimizer that has these groups."""
    return any(strategy.steps(param_groups) for strategy in STRATEGIES)


def averaging_group() -> Any:
    """Return the process group over which an engine up the stack has averaged the gradients, or None."""
    return next((group for strategy in STRATEGIES if (group := strategy.replicas()) is not None), None)


def check_engines(
    param_groups: ParamGroups, given: GivenParams, model: nn.Module | None, *, attached: bool, replaced: bool
) -> None:
    """Call ``Strategy.check_engine`` of all strategies."""
    for strategy in STRATEGIES:
        strategy.check_engine(param_groups, given, model, attached=attached, replaced=replaced)


def check_demand(params: Sequence[LogicalParam], demand: Demand) -> None:
    """Call ``Strategy.check_demand`` of the strategies that hold one of ``params``."""
    for strategy in STRATEGIES:
        if any(logical.strategy is strategy for logical in params):
            strategy.check_demand(params, demand)


def check_exact(params: Sequence[LogicalParam]) -> None:
    """Call ``Strategy.check_exact`` of the strategies that hold one of ``params``."""
    for strategy in STRATEGIES:
        if any(logical.strategy is strategy for logical in params):
            strategy.check_exact(params)


def cover(shards: Sequence[ShardInfo]) -> Cover | None:
    """Return one reduction that serves all ``shards``, or None."""
    return next((found for strategy in STRATEGIES if (found := strategy.cover(shards)) is not None), None)


def logical_ndims(root: nn.Module) -> dict[int, int]:
    """Return ``id(parameter) -> ndim`` of the whole tensor, for parameters whose own ndim differs.

    Raises:
        ValueError: if the ndim is not known.
    """
    return {key: ndim for strategy in STRATEGIES for key, ndim in strategy.logical_ndims(root).items()}
