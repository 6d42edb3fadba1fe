"""The scalar work of a step on all rows in two launches, instead of about a hundred operators of torch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from am_lightning.optim.closed_form import LARGEST_K
from am_lightning.optim.kernels.inputs import Coefficients, GradientClip
from am_lightning.optim.kernels.transfer import uploaded
from am_lightning.optim.kernels.triton.launch import LAUNCH_OPTIONS, current
from am_lightning.optim.kernels.triton.tables import Following

_NAMES = ("cap", "lr", "one_plus_k", "c_root", "c_eps", "decay_factor", "step")
_BLOCK = 512


class RowCoefficients(NamedTuple):
    """The coefficients of a step, known before the sums."""

    columns: Tensor  # [7, rows]
    coefficients: Coefficients  # views of ``columns`` by name
    tail: Tensor  # [rows, 2]: whether there is a gradient here, and whether it is the row's first
    factor: Tensor | None  # 0-dim factor of gradient clipping, or None


class RowKernels:
    """The kernels of one layout, with tables that are kept from step to step."""

    def __init__(self, sizes: Sequence[int], scope: str, device: torch.device) -> None:
        self._rows, self._device = sum(sizes), device
        owners = [group for group, size in enumerate(sizes) for _ in range(size)]
        ends = list(accumulate(sizes)) if scope == "group" else [self._rows]
        self._scopes, self._shared = len(ends), scope != "tensor"
        self._group_of, self._bounds = (uploaded(values, device, torch.int32) for values in (owners, [0, *ends]))
        self._options = Following(device, torch.float64)
        self._captured: list[Any] = []  # objects that CUDA graphs read
        self._kernels = _kernels()

    def coefficients(
        self, table: Tensor, options: Sequence[Sequence[Any]], present: Tensor, clip: GradientClip | None
    ) -> RowCoefficients:
        """Compute the coefficients, before the sums.

        Args:
            table: ``[4, rows]`` float32, the states of the rows.
            options: cap, lr, mu, beta2 and eps of each group. lr may be a one-element tensor.
            present: ``[rows]`` float64, 1 for rows with a gradient on this rank.
            clip: gradient clipping of the step, or None.
        """
        flat = [clip.max_norm if clip is not None else 0.0, *(value for group in options for value in group)]
        on_device = {i: value for i, value in enumerate(flat) if isinstance(value, Tensor)}
        # No option is -1, so values of the device written below are never taken for unchanged Python numbers.
        values = self._options.follow(
            [-1.0 if i in on_device else float(v) for i, v in enumerate(flat)], self._captured
        )
        for i, value in on_device.items():
            values[i : i + 1].copy_(value.detach().reshape(1), non_blocking=True)
        columns, tail = self._new(len(_NAMES), self._rows), self._new(self._rows, 2)
        factor = None if clip is None else self._new()
        with current(self._device):
            self._kernels.coefficients_kernel[(-(-self._rows // _BLOCK),)](
                table, values, self._group_of, present, None if clip is None else clip.norm, columns, tail, factor,
                self._rows, LARGEST_K=LARGEST_K, BLOCK=_BLOCK, **LAUNCH_OPTIONS,
            )  # fmt: skip
        return RowCoefficients(columns, dict(zip(_NAMES, columns.unbind(), strict=True)), tail, factor)

    def decide(
        self,
        packed: Tensor,
        columns: Tensor,
        table: Tensor,
        record: Tensor,
        skipped: Tensor,
        tally: Tensor,
        *,
        skip: bool,
    ) -> tuple[Tensor, Tensor]:
        """Decide beta_t after the sums, and write the states in ``table`` and the statistics of the step.

        Args:
            packed: ``[rows, 4]`` float64, the reduced sums.
            columns: ``[7, rows]`` from ``coefficients``.
            table: ``[4, rows]`` float32, the states of the rows.
            record, skipped: the buffers of ``StepStats``.
            tally: ``[6, rows]`` float64, the numbers of a ``BetaTally``.
            skip: whether a sum that is not finite makes the optimizer skip the step. If False, its rows take the cap.

        Returns:
            omega, ``[rows]``, and a bool tensor, ``[rows]``, True for rows that take part.
        """
        omega = self._new(self._rows)
        active = torch.empty(self._rows, dtype=torch.bool, device=self._device)
        with current(self._device):
            self._kernels.decide_kernel[(1,)](
                packed, columns, table, self._bounds, omega, active.view(torch.uint8), record,
                skipped.view(torch.uint8), tally, self._rows, self._scopes,
                SHARED=self._shared, SKIP=skip, BLOCK=_BLOCK, **LAUNCH_OPTIONS,
            )  # fmt: skip
        return omega, active

    def _new(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float64, device=self._device)


def _kernels() -> Any:
    """Import the kernels, after ``require_triton`` has found Triton."""
    from am_lightning.optim.kernels.triton import row_kernels as triton_row_kernels

    return triton_row_kernels
