"""Gradient clipping by the global norm over the logical tensors of an optimizer."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from am_lightning.distributed import local_grad, redistributed_grad
from am_lightning.optim.argument_hints import with_hints
from am_lightning.optim.base import AdaptiveMemoryOptimizer, outside_graphs
from am_lightning.optim.kernels.inputs import GradientClip, scale_
from am_lightning.optim.param_state import sums_live_on
from am_lightning.optim.squares import square_sums, total_norm
from am_lightning.optim.unwrap import unwrap_optimizer

_TORCHS = {
    "norm_type": "it clips by the 2-norm: leave it out",
    "error_if_nonfinite": "step() skips gradients that are not finite: leave it out",
    "foreach": "the optimizer chooses its kernels: leave it out",
    "parameters": "pass the optimizer, clip_grad_norm_(optimizer, max_norm)",
    "model": "pass the optimizer, clip_grad_norm_(optimizer, max_norm)",
}


@outside_graphs
@with_hints(_TORCHS, "clip_grad_norm_(optimizer, max_norm); it clips by the 2-norm, there is no norm_type")
@torch.no_grad()
def clip_grad_norm_(optimizer: AdaptiveMemoryOptimizer, max_norm: float, *, in_step: bool = False) -> Tensor:
    """Scale the gradients of all of the optimizer's parameters so that their global 2-norm is at most ``max_norm``.

    Call it on every rank after the backward pass and before ``step()``. It works before the first step, too.
    DDP, FSDP1, FSDP2, HSDP, tensor parallelism and combinations of them are supported, with one collective. Gradients
    that tensor parallelism left as Partial sums are redistributed once.

    Args:
        optimizer: an AMAdamW or AMSGD, or a wrapper of Lightning, Fabric or Accelerate around one.
        max_norm: maximal norm, a number >= 0. With ``inf`` the norm is only computed.
        in_step: leave the gradients unchanged, and let the next ``step()`` multiply them (default: False). The Triton
            kernels (CUDA, ROCm) do so in registers, which saves reading and writing the gradients once. Other kernels
            multiply them in place. ``zero_grad()`` cancels the clipping, so a step that a GradScaler skips does no
            harm. If the step is captured in a CUDA graph, this call must be captured, too.

    Returns:
        The norm before clipping, a 0-dim tensor on the device of the sums.

    Raises:
        TypeError, ValueError: if an argument is of the wrong type or out of range, or if the norm of the whole model
            cannot be computed from the parameters of this optimizer.
    """
    optimizer = unwrap_optimizer(optimizer)
    if not isinstance(optimizer, AdaptiveMemoryOptimizer):
        raise TypeError(
            f"Invalid optimizer: {type(optimizer).__name__} (optimizer must be AMAdamW or AMSGD, where torch's "
            "clip_grad_norm_ takes parameters: clip_grad_norm_(optimizer, max_norm))"
        )
    if isinstance(max_norm, bool) or not hasattr(max_norm, "__float__"):
        raise TypeError(
            f"Invalid max_norm: {max_norm!r} (max_norm must be a number >= 0, not {type(max_norm).__name__})"
        )
    if math.isnan(max_norm) or max_norm < 0:
        raise ValueError(f"Invalid max_norm: {max_norm} (max_norm must be a number >= 0)")
    engine = optimizer.param_layout.engine(optimizer.param_groups)
    if engine is not None:
        raise ValueError(
            f"clip_grad_norm_ cannot clip under {engine.name}, whose engine holds the gradients and clips them itself: "
            f"{engine.clipping}"
        )
    layout = optimizer.current_layout()
    layout.check_exact("the global gradient norm")
    for param in dict.fromkeys(row.param for row in layout.logical_params):
        if param.grad is not None:
            param.grad = redistributed_grad(param)  # so that step() need not redistribute Partial sums again
    device, dtype = sums_live_on([row.param for row in layout.logical_params])
    here = [i for i, row in enumerate(layout.logical_params) if row.param.grad is not None]
    gradients = [local_grad(layout.logical_params[i]) for i in here]
    like = torch.empty((), dtype=dtype, device=device)
    if layout.reductions or layout.pipeline_group is not None:
        found = square_sums(gradients, like)
        if len(here) < len(layout.logical_params):
            found = _spread(found, optimizer, tuple(here), len(layout.logical_params))
        squares, _ = layout.all_reduce(found[:, None])
        norm = layout.reduce_over_stages(squares.sum().reshape(1)).reshape(()).sqrt()
    else:
        norm = total_norm(gradients, like)
    if in_step:
        optimizer._workspace.gradient_clip = GradientClip(norm, max_norm)
    else:
        scale_(gradients, GradientClip(norm, max_norm).factor())
    optimizer._stats.grad_norm = norm.detach()
    return norm


def _spread(values: Tensor, optimizer: AdaptiveMemoryOptimizer, here: tuple[int, ...], rows: int) -> Tensor:
    """Spread ``values``, ``[here]``, over ``[rows]``, with zeros at the other rows."""
    out = values.new_zeros(rows)
    return out.index_copy_(0, optimizer._workspace.constants.vector(here, values.device), values)
