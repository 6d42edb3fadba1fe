"""Run the tests under a default device that is not the parameters': ``AM_TESTS_DEFAULT_DEVICE=meta``.

The default applies inside the optimizers' methods only, in which every tensor must name its device; tensors of the
tests themselves stay where they are. "meta" stands for any other device; a tensor that goes there by mistake loses its
numbers.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import torch

import am_lightning
from am_lightning.optim import gradient_clipping as clip
from am_lightning.optim.base import AdaptiveMemoryOptimizer

VARIABLE = "AM_TESTS_DEFAULT_DEVICE"
METHODS = (
    "step", "zero_grad", "state_dict", "load_state_dict", "add_param_group", "momentum", "report", "describe",
    "current_layout", "caps",
)  # fmt: skip


def install() -> None:
    """Set the default device if the variable is set. Call this before test modules import ``clip_grad_norm_``."""
    device = os.environ.get(VARIABLE)
    if device is None:
        return
    for name in METHODS:
        method = getattr(AdaptiveMemoryOptimizer, name)
        setattr(AdaptiveMemoryOptimizer, name, _under(device, _with_closure(method) if name == "step" else method))
    am_lightning.clip_grad_norm_ = clip.clip_grad_norm_ = _under(device, clip.clip_grad_norm_)


def _under(device: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def foreign(*args: Any, **kwargs: Any) -> Any:
        with torch.device(device):
            return function(*args, **kwargs)

    return foreign


def _with_closure(step: Callable[..., Any]) -> Callable[..., Any]:
    """Call the closure, which belongs to the test, without the default device."""

    @functools.wraps(step)
    def closed(self: Any, closure: Callable[[], Any] | None = None) -> Any:
        return step(self, None if closure is None else _under("cpu", closure))

    return closed
