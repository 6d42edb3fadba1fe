"""What a step knows before its sums: kernels, coefficients, and the adaptive scalars and options they are made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from am_lightning.distributed import LogicalParam, ShardLayout, local_grad, local_shard
from am_lightning.optim.adaptive_scalars import Scalars, StateScalars
from am_lightning.optim.closed_form import AdaptiveScalars
from am_lightning.optim.kernels.inputs import Coefficients, GroupOptions
from am_lightning.optim.kernels.plan import KernelPlan, StepTensors
from am_lightning.optim.kernels.triton.row_launch import RowCoefficients, RowKernels
from am_lightning.optim.kernels.workspace import Workspace
from am_lightning.optim.state_store import State, StateStore

_ndim = attrgetter("ndim")


class RowOptions(NamedTuple):
    """Options of each row's group, ``[rows]`` on the device of the sums."""

    beta_max: Tensor
    lr: Tensor
    weight_decay: Tensor  # decoupled


class InKernels(NamedTuple):
    """A step whose coefficients and decision are two Triton kernels' work, in place of ``closed_form``'s operators."""

    kernels: RowKernels
    found: RowCoefficients
    store: StateScalars
    table: Tensor  # [4, rows], the store's states


class StepInputs(NamedTuple):
    """``scalars`` and ``options`` are None where the rest of the step is ``in_kernels``."""

    plan: KernelPlan
    coefficients: Coefficients
    scalars: AdaptiveScalars | None
    options: RowOptions | None
    in_kernels: InKernels | None


def row_options(
    plan: KernelPlan,
    groups: Sequence[dict[str, Any]],
    sizes: Sequence[int],
    cap_key: str,
    group_options: Callable[[dict[str, Any]], GroupOptions],
) -> RowOptions:
    """Of every row, from those of its group."""
    return RowOptions(
        beta_max=plan.column("beta_max", [group[cap_key] for group in groups], sizes),
        lr=plan.column("lr", [group["lr"] for group in groups], sizes),
        weight_decay=plan.column("mu", [group_options(group).mu for group in groups], sizes),
    )


def inputs_of(
    plan: KernelPlan,
    store: Scalars,
    options: RowOptions,
    columns: Callable[[AdaptiveScalars, RowOptions], dict[str, Tensor]],
    workspace: Workspace,
) -> StepInputs:
    """By torch's operators.

    Args:
        columns: the optimizer's coefficients.
    """
    clip = workspace.take_clip()
    workspace.gradient_factor = None if clip is None else clip.factor()
    scalars = store.read()
    return StepInputs(plan, Coefficients(columns(scalars, options)), scalars, options, None)


def inputs_in_kernels(
    plan: KernelPlan,
    store: StateScalars,
    kernels: RowKernels,
    options: list[list[float | Tensor]],
    workspace: Workspace,
) -> StepInputs:
    """The same by one Triton kernel.

    Args:
        options: cap, lr, mu, beta2, eps of each group.
    """
    table = store.table()
    found = kernels.coefficients(table, options, plan.present, workspace.take_clip())
    workspace.gradient_factor = found.factor
    return StepInputs(plan, found.coefficients, None, None, InKernels(kernels, found, store, table))


def step_tensors(
    layout: ShardLayout,
    store: StateStore,
    state: State,
    groups: Sequence[dict[str, Any]],
    direction: torch.dtype | None,
    who: str,
) -> StepTensors:
    """Parameters that have a gradient here. All are checked before the first state is made.

    Args:
        direction: ``exp_avg_dtype``.
        who: the optimizer, for messages.

    Raises:
        RuntimeError: a gradient is sparse or complex.
    """
    rows = tuple([i for i, logical in enumerate(layout.logical_params) if logical.param.grad is not None])
    here = [layout.logical_params[i] for i in rows]
    x: Sequence[Any] = [logical.param for logical in here]
    grads: Sequence[Any] = [param.grad for param in x]
    for logical, grad in zip(here, grads, strict=True):
        if grad.layout is not torch.strided or grad.is_complex():
            _refuse_gradient(logical, who)
    moments = store.moments(state, here, groups, direction)
    if not layout.holds_whole_tensors:
        x, grads = [local_shard(p, p.param) for p in here], [local_grad(p) for p in here]
        moments = [[local_shard(*pair) for pair in zip(here, column, strict=True)] for column in moments]
    x, g, d, *v = (_at_least_1d(column) for column in (x, grads, *moments))
    return StepTensors(rows, x, g, d, v[0] if v else None)


def _at_least_1d(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """A 0-dim operand would take the dtype of a 0-dim number."""
    return tensors if all(map(_ndim, tensors)) else [t if t.ndim else t.reshape(1) for t in tensors]


def _refuse_gradient(logical: LogicalParam, who: str) -> None:
    param = logical.param
    assert param.grad is not None
    if param.grad.layout is not torch.strided:
        raise RuntimeError(
            f"{who} does not support sparse gradients: parameter {logical.name!r} has a gradient of layout "
            f"{param.grad.layout}"
        )
    raise RuntimeError(
        f"{who} does not support complex parameters: parameter {logical.name!r} is {param.dtype}; use view_as_real"
    )
