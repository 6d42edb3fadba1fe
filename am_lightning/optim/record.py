"""What is remembered of the steps made, on the device: kept without a host sync, read when somebody logs."""

from __future__ import annotations

import torch
from torch import Tensor

from am_lightning.optim.closed_form import Decision


class StepRecord:
    """Counts of skipped steps, the first row whose sums were not finite in the last of them, the last gradient norm."""

    def __init__(self) -> None:
        self.skipped = torch.zeros((), dtype=torch.bool)  # the last step was
        self.grad_norm: Tensor | None = None  # set by clip_grad_norm_
        self._counts = torch.zeros(3, dtype=torch.int64)  # skipped in all, in a row up to now, first bad row

    def observe(self, decision: Decision) -> None:
        """Take in one step's decision. In place, so that a captured graph keeps its addresses."""
        device = decision.skipped.device
        if self.skipped.device != device:
            self.skipped, self._counts = self.skipped.to(device), self._counts.to(device)
        skipped = decision.skipped.to(torch.int64)
        total, run, bad_row = self._counts.unbind()
        self.skipped.copy_(decision.skipped)
        total.add_(skipped)
        run.add_(skipped).mul_(skipped)
        bad_row.copy_(torch.where(decision.skipped, decision.bad.to(torch.int64).argmax(), bad_row))

    def numbers(self, like: Tensor) -> Tensor:
        """``[4]``: skipped steps in all, in a row until now, index of the first bad row, gradient norm or nan."""
        norm = torch.full((), float("nan")) if self.grad_norm is None else self.grad_norm
        return torch.cat([self._counts.to(like), norm.reshape(1).to(like)])
