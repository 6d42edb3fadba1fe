"""What the ranks agree on at their first step: who takes fused kernels, and whether Triton is the default."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from am_lightning.distributed import LogicalParam, ShardLayout
from am_lightning.optim.kernels import fused
from am_lightning.optim.kernels.plan import Choice, Workspace, tiers
from am_lightning.optim.kernels.transfer import is_fake
from am_lightning.optim.kernels.triton.check import Kind
from am_lightning.optim.kernels.triton.row_launch import RowKernels
from am_lightning.optim.scalars import StateScalars, sums_live_on
from am_lightning.optim.state import direction_dtype

Groups = Sequence[dict[str, Any]]


def choice_of(group: dict[str, Any]) -> Choice:
    """A group's options; AMSGD's have no ``fused``."""
    return Choice(group["foreach"], group.get("fused"))


def agree_on_kernels(
    layout: ShardLayout, groups: Groups, workspace: Workspace, dropped: bool | None, direction: torch.dtype | None
) -> bool:
    """Collective where ranks share tensors that fused kernels may take: all of them take the same kernels.

    Args:
        dropped: whether ``convert_adamw`` has taken ``fused=True`` away here; None: there was none.
        direction: ``exp_avg_dtype``.

    Returns:
        False where a rank has lost ``fused=True``: all are to do without.
    """

    def summed(votes: Tensor) -> Tensor:
        device, dtype = sums_live_on([row.param for row in layout.logical_params])
        nothing = torch.zeros(len(layout.logical_params), 1, dtype=dtype, device=device)
        total = layout.all_reduce(nothing, votes.to(nothing))[1]
        assert total is not None
        return total

    if is_fake():
        return True
    asked, default = _kinds_on_gpu(layout.logical_params, groups, direction)
    # A converted optimizer may have fallen back on some ranks only, which vote too.
    if asked or default or dropped is not None:
        agreed = fused.agree_on_gpu(summed if layout.reductions else None, asked, default, bool(dropped))
        workspace.take_default(agreed.why_not)
        if not agreed.fused:
            return False
    on_cpu = (row for row in layout.logical_params if row.param.device.type == "cpu")
    if layout.reductions and any(groups[row.group_index].get("fused") for row in on_cpu):
        workspace.agreed_on_cpu = fused.agreed_on_cpu(summed)
    return True


def _kinds_on_gpu(
    rows: Sequence[LogicalParam], groups: Groups, direction: torch.dtype | None
) -> tuple[set[Kind], set[Kind]]:
    """Of parameters that Triton may serve: with ``fused=True``, and with neither ``fused`` nor ``foreach`` set."""
    asked: set[Kind] = set()
    default: set[Kind] = set()
    for row in rows:
        group, param = groups[row.group_index], row.param
        if "fused" in group and param.device.type in fused.TRITON_DEVICES:
            kind = Kind(param.device, param.dtype, direction_dtype(param, direction))
            if group["fused"]:
                asked.add(kind)
            elif choice_of(group).by_default:
                default.add(kind)
    return asked, default


def drop_fused(groups: Groups) -> None:
    """As ``convert_adamw`` does where fused kernels cannot be built."""
    if any(group.get("fused") for group in groups):
        warnings.warn(
            "fused=True becomes fused=None, as on another rank, whose fused kernels cannot be built", stacklevel=2
        )
    for group in groups:
        if group.get("fused"):
            group["fused"] = None


def row_kernels(
    layout: ShardLayout, groups: Groups, scope: str, store: StateScalars, workspace: Workspace
) -> RowKernels | None:
    """The kernels of the rows' own numbers, where every row is on one GPU and goes to Triton.

    They round otherwise than torch's operators, so this looks at nothing that differs between ranks with copies.
    """
    if layout.pipeline_group is not None:
        return None
    device = store.device_of_float32
    if device is None or device.type not in fused.TRITON_DEVICES:
        return None
    if any(tiers(device, choice_of(group), workspace)[0] != fused.TRITON for group in groups if group["params"]):
        return None
    sizes = tuple(layout.sizes)
    key = sizes, scope, device
    made: RowKernels = workspace.constants.made(key, device, lambda: RowKernels(*key))
    return made
