"""Gradient clipping by the global norm, on the optimizer's own rows."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from am_lightning.optim.base import AdaptiveMemoryOptimizer, sums_live_on
from am_lightning.optim.squares import square_sum


@torch.no_grad()
def clip_grad_norm_(optimizer: AdaptiveMemoryOptimizer, max_norm: float) -> Tensor:
    """Scale the gradients of all of the optimizer's parameters so that their global 2-norm is at most ``max_norm``.

    Call it after backward and before ``step()``; also before the first. Replicas take the first rank's norm, so they
    scale alike (one collective).

    Args:
        optimizer: AMAdamW or AMSGD.
        max_norm: a number >= 0; ``inf`` only computes the norm.

    Returns:
        0-dim, the norm before clipping, on the device of the sums.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range.
    """
    if not isinstance(optimizer, AdaptiveMemoryOptimizer):
        raise TypeError(f"Invalid optimizer: {type(optimizer).__name__} (optimizer must be AMAdamW or AMSGD)")
    if isinstance(max_norm, bool) or not hasattr(max_norm, "__float__"):
        raise TypeError(
            f"Invalid max_norm: {max_norm!r} (max_norm must be a number >= 0, not {type(max_norm).__name__})"
        )
    if math.isnan(max_norm) or max_norm < 0:
        raise ValueError(f"Invalid max_norm: {max_norm} (max_norm must be a number >= 0)")
    layout = optimizer.current_layout()
    params = [row.param for row in layout.rows]
    device, dtype = sums_live_on(params)
    nothing = torch.zeros((), dtype=dtype, device=device)
    found = [nothing if p.grad is None else square_sum(p.grad, nothing) for p in params]
    squares = torch.stack(found)[:, None]
    squares, _ = layout.all_reduce(squares)
    norm = squares.sum().sqrt()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for param in params:
        if param.grad is not None:
            param.grad.mul_(scale.to(param.device, non_blocking=True))
    optimizer.remember_grad_norm(norm)
    return norm
