"""ZeroRedundancyOptimizer: it steps an inner optimizer on each rank that sees only that rank's tensors, whole."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any


def inside_zero_redundancy(optimizer: Any) -> bool:
    """True where a ZeroRedundancyOptimizer up the stack is stepping ``optimizer``, which has no pointer to it."""
    module = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    if module is None:
        return False
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, module.ZeroRedundancyOptimizer) and getattr(owner, "optim", None) is optimizer:
            return True
        frame = frame.f_back
    return False
