"""What is counted of the steps made, on the device: kept without a host sync, read when somebody logs."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from am_lightning.distributed import ShardLayout
from am_lightning.optim.closed_form import Decision
from am_lightning.optim.intervals import SUMMED, IntervalReaders, emptied, nothing
from am_lightning.optim.kernels.transfer import is_capturing


class BetaTally:
    """Statistics of beta_t since the last read, for one layout. Addresses never change, so captured graphs stay valid.

    Attributes:
        names: the names of the tensors.
        numbers: ``[6, tensors]``, an ``Interval``.
    """

    def __init__(self, names: tuple[str, ...], like: Tensor) -> None:
        self.names = names
        self.numbers = nothing(like, len(names))
        self._totals, self._lowest, self._highest = self.numbers[:SUMMED], self.numbers[4], self.numbers[5]
        self._edges = torch.zeros_like(self.numbers[:2])  # the cap, and 0
        self._nan = self.numbers.new_full((), float("nan"))  # a number of the host would be filled in at every step
        self._cap: Tensor | None = None  # in the first of them

    def add(self, beta: Tensor, cap: Tensor, active: Tensor) -> None:
        """Take in one step: six operations for any number of tensors, and one where ``cap`` is another than before.

        Args:
            beta: ``[tensors]``, clipped to [0, cap], so that it equals them at the clamps.
            cap: ``[tensors]``.
            active: ``[tensors]`` bool, those that take part.
        """
        if cap is not self._cap or (cap.device.type == "cuda" and is_capturing(cap.device)):
            self._edges[0].copy_(cap)
            self._cap = cap
        taken = torch.where(active, beta, self._nan)  # fmin and fmax pass over nan
        torch.fmin(self._lowest, taken, out=self._lowest)
        torch.fmax(self._highest, taken, out=self._highest)
        self._totals.addcmul_(torch.cat([beta[None], self._edges == beta, active[None]]), active)

    def take(self) -> Tensor:
        """``[6, tensors]``, and begin anew."""
        taken = self.numbers.clone()
        emptied(self.numbers)
        return taken


class StepStats:
    """Counts of skipped steps, the first row whose sums were not finite in the last of them, the last gradient norm.

    And beta_t of all steps since it was last read, for several readers.
    """

    def __init__(self) -> None:
        self.skipped = torch.zeros((), dtype=torch.bool, device="cpu")  # the last step was
        self.grad_norm: Tensor | None = None  # set by clip_grad_norm_
        # Skipped in all, in a row, first bad row, in a row before
        self._counts = torch.zeros(4, dtype=torch.int64, device="cpu")
        self._readers = IntervalReaders()
        self._tallies: dict[Hashable, BetaTally] = {}  # by names and kind: a layout would keep its parameters alive
        self._of_layout: dict[ShardLayout, BetaTally] = {}

    def observe(
        self, decision: Decision, cap: Tensor, tally: BetaTally, positions: Tensor | None = None, *, again: bool = False
    ) -> None:
        """Take in one step's decision. In place, so that a captured graph keeps its addresses.

        Args:
            cap: ``[rows]``.
            tally: of the step's layout.
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
        tally.add(decision.beta, cap, decision.active)

    def buffers(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """``[4]`` counts and the 0-dim flag, for a kernel that writes them as ``observe`` does."""
        if self.skipped.device != device:
            self.skipped, self._counts = self.skipped.to(device), self._counts.to(device)
        return self._counts, self.skipped

    def numbers(self, like: Tensor) -> Tensor:
        """``[4]``: skipped steps in all, in a row until now, index of the first bad row, gradient norm or nan."""
        norm = like.new_full((), float("nan")) if self.grad_norm is None else self.grad_norm
        return torch.cat([self._counts[:3].to(like), norm.reshape(1).to(like)])

    # ------------------------------------------------------------------ beta_t over intervals
    def tally_of(self, layout: ShardLayout, like: Tensor) -> BetaTally:
        """That of a step of ``layout``, in the dtype and on the device of ``like``."""
        found = self._of_layout.get(layout)
        if found is None:
            names = tuple(logical.name for logical in layout.logical_params)
            kind = names, like.dtype, like.device, type(like)  # of fake tensors
            found = self._tallies.get(kind) or BetaTally(names, like)
            self._tallies[kind] = self._of_layout[layout] = found
        return found

    def forget_layouts(self) -> None:
        """Layouts are made anew; what was tallied is kept until it is read."""
        self._of_layout = {}

    def begin_interval(self, reader: Any, *, unread: bool = False) -> None:
        """From now on ``reader`` has an interval of its own; ``unread``: with the steps that nobody has read."""
        if not unread:
            self._empty_tallies()
        self._readers.begin(reader)

    def interval(self, reader: Any, names: Sequence[str]) -> Tensor:
        """``[6, names]``, an ``Interval`` since ``reader`` read last; a new one gets what nobody has read."""
        if reader not in self._readers:
            self.begin_interval(reader, unread=True)
        self._empty_tallies()
        return self._readers.take(reader, names)

    def _empty_tallies(self) -> None:
        for kind, tally in self._tallies.items():
            self._readers.give(kind, tally.names, tally.take())
        in_use = set(map(id, self._of_layout.values()))
        self._tallies = {kind: tally for kind, tally in self._tallies.items() if id(tally) in in_use}
