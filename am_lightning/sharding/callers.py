"""Who steps an optimizer: wrappers and engines hold it and call it, and it has no pointer to them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

_ZERO_REDUNDANCY = "torch.distributed.optim.zero_redundancy_optimizer"


def inside_zero_redundancy(optimizer: Any) -> bool:
    """True where a ZeroRedundancyOptimizer up the stack steps ``optimizer``, which sees only this rank's tensors."""
    return _owner(optimizer, "optim", _ZERO_REDUNDANCY) is not None


def deepspeed_owner(optimizer: Any) -> Any:
    """DeepSpeed's optimizer up the stack that steps ``optimizer``, or None."""
    return _owner(optimizer, "optimizer", "deepspeed")


def deepspeed_replicas() -> Any:
    """The process group of the ranks whose gradients a DeepSpeed engine up the stack has averaged, or None."""
    if "deepspeed" not in sys.modules:
        return None
    for frame in _frames():
        if _module(frame).startswith("deepspeed"):
            group = getattr(frame.f_locals.get("self"), "data_parallel_group", None)
            if group is not None:
                return group
    return None


def inside_deepspeed_warm_up() -> bool:
    """True where DeepSpeed makes a step with zero gradients while it is built, of which nothing must be left.

    It counts as a step and decays the weights: FP16_UnfusedOptimizer (stage 0 in 16 bit) does so.
    """
    if "deepspeed" not in sys.modules:
        return False
    return any(
        frame.f_code.co_name == "initialize_optimizer_states" and _module(frame).startswith("deepspeed")
        for frame in _frames()
    )


def _owner(optimizer: Any, attribute: str, module: str) -> Any:
    if module not in sys.modules:
        return None
    for frame in _frames():
        if _module(frame).startswith(module):
            owner = frame.f_locals.get("self")
            if getattr(owner, attribute, None) is optimizer:
                return owner
    return None


def _frames() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))
