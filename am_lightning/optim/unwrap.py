"""Helpers of the framework adapters: they unwrap the optimizer, and tell it about the model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from am_lightning.distributed.strategies import placement_of
from am_lightning.optim.base import AdaptiveMemoryOptimizer


def unwrap_optimizer(optimizer: Any) -> Any:
    """Return the optimizer inside the wrappers of Lightning, Fabric, Accelerate and DeepSpeed.

    The wrappers of Lightning and Fabric pass isinstance checks, but attributes set on them do not reach the optimizer.
    """
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def am_optimizers(optimizers: Iterable[Any]) -> list[AdaptiveMemoryOptimizer]:
    """Return the adaptive memory optimizers among ``optimizers``, unwrapped."""
    inner = map(unwrap_optimizer, optimizers)
    return [optimizer for optimizer in inner if isinstance(optimizer, AdaptiveMemoryOptimizer)]


def require_am_optimizer(optimizer: Any, hint: str) -> AdaptiveMemoryOptimizer:
    """Return the adaptive memory optimizer inside ``optimizer``.

    Raises:
        TypeError: if it is another optimizer. The message ends with ``hint``.
    """
    inner = unwrap_optimizer(optimizer)
    if not isinstance(inner, AdaptiveMemoryOptimizer):
        raise TypeError(f"Invalid optimizer: {type(inner).__name__} (optimizer must be AMAdamW or AMSGD: {hint})")
    return inner


def bind_distributed(optimizer: AdaptiveMemoryOptimizer, model: nn.Module, *, replicated: bool) -> None:
    """Give ``optimizer`` the names and FSDP1's process groups of ``model``, and its ``replica_group`` where it is None.

    Args:
        replicated: all ranks hold the same parameters, as under DDP.
    """
    optimizer.bind_model(model)
    if not replicated or optimizer.replica_group is not None:
        return
    if not any(placement_of(param) is not None for group in optimizer.param_groups for param in group["params"]):
        optimizer.replica_group = torch.distributed.group.WORLD
