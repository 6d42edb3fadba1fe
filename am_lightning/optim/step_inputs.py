"""Inputs of a step: its kernels, its coefficients, and the adaptive scalars and options they are computed from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from am_lightning.distributed import ShardLayout
from am_lightning.optim.closed_form import RowOptions
from am_lightning.optim.kernels.inputs import Coefficients, GradientClip
from am_lightning.optim.kernels.plan import KernelPlan
from am_lightning.optim.kernels.triton.row_launch import RowCoefficients, RowKernels
from am_lightning.optim.kernels.workspace import Workspace
from am_lightning.optim.state_store import Scalars, StateScalars
from am_lightning.optim.step_stats import StepStats


class InKernels(NamedTuple):
    """Inputs of a step whose coefficients and decision are computed by Triton kernels instead of ``closed_form``."""

    kernels: RowKernels
    found: RowCoefficients
    table: Tensor  # [4, rows], the scalar states of the store


class StepInputs(NamedTuple):
    """Inputs of a step. ``scalars`` and ``options`` are None if ``in_kernels`` is set."""

    plan: KernelPlan
    coefficients: Coefficients
    store: Any  # Scalars, and StateScalars if ``in_kernels`` is set
    scalars: Any  # AdaptiveScalars
    options: Any  # RowOptions
    in_kernels: InKernels | None


def inputs_in_kernels(
    plan: KernelPlan,
    store: Scalars,
    kernels: RowKernels,
    options: Sequence[RowOptions],
    clip: GradientClip | None,
    workspace: Workspace,
) -> StepInputs:
    """Compute the coefficients of a step with one Triton kernel.

    Args:
        plan: the kernels of the step.
        store: the adaptive scalars of the rows, a ``StateScalars``.
        kernels: the kernels that compute the coefficients and the decision.
        options: the options of each group.
        clip: the gradient clipping of this step, or None.
        workspace: receives the factor of the gradients.
    """
    assert isinstance(store, StateScalars)
    table = store.table()
    found = kernels.coefficients(table, [values[:5] for values in options], plan.present, clip)
    workspace.gradient_factor = found.factor
    return StepInputs(plan, found.coefficients, store, None, None, InKernels(kernels, found, table))


def finish_in_kernels(local: StepInputs, packed: Tensor, stats: StepStats, layout: ShardLayout, *, skip: bool) -> None:
    """Finish a step from the reduced sums.

    Args:
        local: the inputs of the step.
        packed: the reduced sums.
        stats: statistics in which the kernel counts the step.
        layout: the layout of the step.
        skip: whether a sum that is not finite makes the optimizer skip the step.
    """
    assert local.in_kernels is not None
    kernels, found, table = local.in_kernels
    tally = stats.tally_of(layout, packed).numbers
    omega, active = kernels.decide(packed, found.columns, table, *stats.buffers(packed.device), tally, skip=skip)
    local.coefficients["omega"] = omega
    local.plan.update(local.coefficients, active)
    local.store.take(table, active)
