"""torch.distributed.checkpoint's way to make an optimizer create its state: a step at lr 0 with zero gradients."""

from __future__ import annotations

import sys
from types import FrameType


def inside_state_creation() -> bool:
    """True where torch.distributed.checkpoint makes the step that creates the state, of which nothing must be left.

    Each rank whose optimizer has no state makes it. With FSDP1 that may be one rank alone, which holds no element of
    the optimizer's parameters and so has no state in mid-run either: a collective would wait for ever, and neither lr
    nor gradients tell this rank whether the others are here too.
    """
    module = sys.modules.get("torch.distributed.checkpoint.state_dict")
    code = getattr(getattr(module, "_init_optim_state", None), "__code__", None)
    frame: FrameType | None = sys._getframe(1) if code is not None else None
    while frame is not None:
        if frame.f_code is code:
            return True
        frame = frame.f_back
    return False
