"""What frameworks put around an optimizer."""

from __future__ import annotations

from typing import Any

from am_lightning.optim.base import AdaptiveMemoryOptimizer


def innermost(optimizer: Any) -> Any:
    """The optimizer inside the wrappers of Lightning, Fabric, Accelerate and DeepSpeed.

    Lightning's and Fabric's imitate its class: they pass for it, but what is set on them does not reach it.
    """
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def adaptive(optimizer: Any, cure: str) -> AdaptiveMemoryOptimizer:
    """The adaptive memory optimizer in ``optimizer``.

    Raises:
        TypeError: there is none; the text ends with ``cure``.
    """
    inner = innermost(optimizer)
    if not isinstance(inner, AdaptiveMemoryOptimizer):
        raise TypeError(f"Invalid optimizer: {type(inner).__name__} (optimizer must be AMAdamW or AMSGD: {cure})")
    return inner
