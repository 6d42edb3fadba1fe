"""What is remembered of the steps made, on the device: kept without a host sync, read when somebody logs."""

from __future__ import annotations

import torch
from torch import Tensor

from am_lightning.optim.closed_form import Decision


class StepStats:
    """Counts of skipped steps, the first row whose sums were not finite in the last of them, the last gradient norm."""

    def __init__(self) -> None:
        self.skipped = torch.zeros((), dtype=torch.bool, device="cpu")  # the last step was
        self.grad_norm: Tensor | None = None  # set by clip_grad_norm_
        # Skipped in all, in a row, first bad row, in a row before
        self._counts = torch.zeros(4, dtype=torch.int64, device="cpu")

    def observe(self, decision: Decision, positions: Tensor | None = None, *, again: bool = False) -> None:
        """Take in one step's decision. In place, so that a captured graph keeps its addresses.

        Args:
            positions: ``[rows]``, where the decision's rows are among all tensors; None: they are all of them.
            again: one more call of a training step that an engine makes in several; it is skipped if any of them is.
        """
        if self.skipped.device != decision.skipped.device:
            self.buffers(decision.skipped.device)
        total, run, bad_row, run_before = self._counts.unbind()
        before = self.skipped & again
        if not again:
            run_before.copy_(run)
        now = before | decision.skipped
        total.add_((now & ~before).to(torch.int64))
        run.copy_((run_before + 1) * now)
        if decision.bad.numel():
            first_bad = decision.bad.to(torch.int64).argmax()
            if positions is not None:
                first_bad = positions.index_select(0, first_bad.reshape(1)).reshape(())  # positions[...] would wait
            bad_row.copy_(torch.where(decision.skipped & ~before, first_bad, bad_row))
        self.skipped.copy_(now)

    def buffers(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """``[4]`` counts and the 0-dim flag, for a kernel that writes them as ``observe`` does."""
        if self.skipped.device != device:
            self.skipped, self._counts = self.skipped.to(device), self._counts.to(device)
        return self._counts, self.skipped

    def numbers(self, like: Tensor) -> Tensor:
        """``[4]``: skipped steps in all, in a row until now, index of the first bad row, gradient norm or nan."""
        norm = like.new_full((), float("nan")) if self.grad_norm is None else self.grad_norm
        return torch.cat([self._counts[:3].to(like), norm.reshape(1).to(like)])
