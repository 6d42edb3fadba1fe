"""What a step knows before its sums: kernels, coefficients, and the adaptive scalars and options they are made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from am_lightning.distributed import ShardLayout
from am_lightning.optim.adaptive_scalars import Scalars, StateScalars
from am_lightning.optim.closed_form import AdaptiveScalars
from am_lightning.optim.kernels.agreement import row_kernels
from am_lightning.optim.kernels.inputs import Coefficients, GradientClip
from am_lightning.optim.kernels.plan import KernelPlan
from am_lightning.optim.kernels.triton.row_launch import RowCoefficients, RowKernels
from am_lightning.optim.kernels.workspace import Workspace


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


def inputs_of(
    plan: KernelPlan, store: Scalars, options: RowOptions, columns: Callable[[AdaptiveScalars, RowOptions], Any]
) -> StepInputs:
    """By torch's operators.

    Args:
        columns: the optimizer's ``_coefficients``.
    """
    scalars = store.read()
    return StepInputs(plan, Coefficients(columns(scalars, options)), scalars, options, None)


def inputs_in_kernels(
    plan: KernelPlan,
    store: Scalars,
    layout: ShardLayout,
    groups: Sequence[dict[str, Any]],
    scope: str,
    row_options: Callable[[dict[str, Any]], list[float | Tensor]],
    workspace: Workspace,
    clip: GradientClip | None,
) -> StepInputs | None:
    """The same by one kernel; None where the tensors do not all go to Triton.

    Args:
        row_options: the optimizer's.
    """
    kernels = row_kernels(layout, groups, scope, store, workspace)
    if kernels is None:
        return None
    assert isinstance(store, StateScalars)
    table = store.table()
    found = kernels.coefficients(table, [row_options(group) for group in groups], plan.present, clip)
    workspace.gradient_factor = found.factor
    return StepInputs(plan, found.coefficients, None, None, InKernels(kernels, found, store, table))
