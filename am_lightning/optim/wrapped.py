"""What frameworks put around an optimizer."""

from __future__ import annotations

from typing import Any


def innermost(optimizer: Any) -> Any:
    """The optimizer inside the wrappers of Lightning, Fabric and Accelerate.

    Lightning's and Fabric's imitate its class: they pass for it, but what is set on them does not reach it.
    """
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer
