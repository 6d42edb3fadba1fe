"""What a step knows before its sums: kernels, coefficients, and the adaptive scalars and options they are made of."""

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
    """A step whose coefficients and decision are two Triton kernels' work, in place of ``closed_form``'s operators."""

    kernels: RowKernels
    found: RowCoefficients
    table: Tensor  # [4, rows], the store's states


class StepInputs(NamedTuple):
    """``scalars`` and ``options`` are None where the rest of the step is ``in_kernels``."""

    plan: KernelPlan
    coefficients: Coefficients
    store: Any  # Scalars; StateScalars where ``in_kernels``
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
    """The coefficients by one Triton kernel.

    Args:
        options: of each group.
        clip: of this step.
    """
    assert isinstance(store, StateScalars)
    table = store.table()
    found = kernels.coefficients(table, [values[:5] for values in options], plan.present, clip)
    workspace.gradient_factor = found.factor
    return StepInputs(plan, found.coefficients, store, None, None, InKernels(kernels, found, table))


def finish_in_kernels(local: StepInputs, packed: Tensor, stats: StepStats, layout: ShardLayout, *, skip: bool) -> None:
    """From the reduced sums to the end of the step.

    Args:
        stats: in which the kernel counts the step.
        skip: a sum that is not finite drops the step.
    """
    assert local.in_kernels is not None
    kernels, found, table = local.in_kernels
    tally = stats.tally_of(layout, packed).numbers
    omega, active = kernels.decide(packed, found.columns, table, *stats.buffers(packed.device), tally, skip=skip)
    local.coefficients["omega"] = omega
    local.plan.update(local.coefficients, active)
    local.store.take(table, active)
