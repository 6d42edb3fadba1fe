"""Agreement on the kernels among ranks that share tensors, at the first step of a layout, so that copies stay equal."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from am_lightning.distributed import LogicalParam, ShardLayout
from am_lightning.optim.kernels import registry
from am_lightning.optim.kernels.plan import choice_of
from am_lightning.optim.kernels.registry import CPP, TRITON, fused_kernel, kernels_for
from am_lightning.optim.kernels.transfer import is_fake
from am_lightning.optim.kernels.triton.check import Kind
from am_lightning.optim.kernels.triton.row_launch import RowKernels
from am_lightning.optim.kernels.workspace import Workspace
from am_lightning.optim.param_state import direction_dtype, sums_live_on
from am_lightning.optim.state_store import Scalars, StateScalars

Groups = Sequence[dict[str, Any]]


def agree_on_kernels(
    layout: ShardLayout, groups: Groups, workspace: Workspace, dropped: bool | None, direction: torch.dtype | None
) -> bool:
    """Make all ranks that share tensors use the same kernels. Collective if fused kernels may serve shared tensors.

    Args:
        layout: the layout of the step.
        groups: the parameter groups.
        workspace: receives the device types whose fused kernel serves by default.
        dropped: whether ``convert_adamw`` set ``fused=True`` to None on this rank, or None if no group had it.
        direction: ``exp_avg_dtype``.

    Returns:
        False if ``fused=True`` was set to None on some rank, so that all ranks must do so.

    Raises:
        RuntimeError: if ``fused=True`` does not work on some rank. Raised on every rank.
    """
    if is_fake():
        return True
    asked, default = _kinds(layout.logical_params, groups, direction)
    if not (asked or default or dropped is not None):
        return True  # a converted optimizer with ``dropped`` votes, because only some ranks may have lost fused=True
    missing, reason = (next(filter(None, map(_why_not, sorted(kinds, key=str))), "") for kinds in (asked, default))
    failed, without, fallen = _summed([bool(missing), bool(reason), bool(dropped)], layout)
    if failed:
        others = f"it does not work on {failed} of the other ranks (their own errors say why): install it on all nodes"
        kernel = fused_kernel(sorted(asked, key=str)[0].device) or CPP
        raise RuntimeError(f"fused=True {registry.needs(kernel)}, but {missing or others}, or use fused=None")
    why = reason or (f"it does not work on {without} of the other ranks" if without else "")
    _take_default(workspace, {kind.device.type for kind in default}, why)
    return not fallen


def _take_default(workspace: Workspace, device_types: set[str], why_not: str) -> None:
    """Let fused kernels serve by default on these devices, unless they do not work for one of the layouts."""
    workspace.why_no_fused = workspace.why_no_fused or why_not
    workspace.fused_by_default = set() if workspace.why_no_fused else workspace.fused_by_default | device_types


def _kinds(
    params: Sequence[LogicalParam], groups: Groups, direction: torch.dtype | None
) -> tuple[set[Kind], set[Kind]]:
    """Return the kinds of parameters that fused kernels may serve: by ``fused=True``, and by default."""
    asked: set[Kind] = set()
    default: set[Kind] = set()
    for logical in params:
        group, param = groups[logical.group_index], logical.param
        if "fused" not in group:
            continue
        kind = Kind(param.device, param.dtype, direction_dtype(param, direction))
        if group["fused"]:
            asked.add(kind)
        elif choice_of(group).by_default and param.device.type in registry.FUSED_BY_DEFAULT:
            default.add(kind)
    return asked, default


def _why_not(kind: Kind) -> str:
    kernel = fused_kernel(kind.device)
    if kernel is None:
        registry.require_kernel(kind)
    assert kernel is not None
    try:
        return kernel.why_not(kind)
    except Exception as error:  # the other ranks wait for the vote of this one, whatever the error is
        return str(error) or type(error).__name__


def _summed(votes: list[bool], layout: ShardLayout) -> list[int]:
    """Sum the votes over all ranks that share tensors of the layout."""
    if not layout.reductions:
        return [int(vote) for vote in votes]
    device, dtype = sums_live_on([logical.param for logical in layout.logical_params])
    nothing = torch.zeros(len(layout.logical_params), 1, dtype=dtype, device=device)
    total: Tensor | None = layout.all_reduce(nothing, torch.tensor(votes, device="cpu").to(nothing))[1]
    assert total is not None
    return [int(number) for number in total.tolist()]


def row_kernels(
    layout: ShardLayout, groups: Groups, scope: str, store: Scalars, workspace: Workspace
) -> RowKernels | None:
    """Return the Triton kernels of the adaptive scalars, or None unless Triton serves every row on one GPU.

    They round differently from torch's operators, so the choice depends on nothing that differs between replicas.
    """
    device = store.device_of_float32 if isinstance(store, StateScalars) else None
    if device is None or layout.pipeline_group is not None or device.type not in (TRITON.device_types or ()):
        return None
    default = TRITON if device.type in workspace.fused_by_default else None
    choices = [choice_of(group) for group in groups if group["params"]]
    if any(kernels_for(device, choice, default)[0] is not TRITON for choice in choices):
        return None
    key = tuple(layout.sizes), scope, device
    made: RowKernels = workspace.constants.made(key, device, lambda: RowKernels(*key))
    return made


def drop_fused(groups: Groups) -> None:
    """Set ``fused=True`` to None, with a warning, as ``convert_adamw`` does if fused kernels cannot be built."""
    if any(group.get("fused") for group in groups):
        warnings.warn(
            "fused=True becomes fused=None, because another rank cannot build its fused kernels", stacklevel=2
        )
    for group in groups:
        if group.get("fused"):
            group["fused"] = None
