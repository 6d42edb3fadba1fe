"""Statistics of the steps, kept on the device without a host sync until a logger reads them."""

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
        names: names of the tensors.
        numbers: ``[6, tensors]``, the fields of an ``Interval``.
    """

    def __init__(self, names: tuple[str, ...], like: Tensor) -> None:
        self.names = names
        self.numbers = nothing(like, len(names))
        self._totals, self._lowest, self._highest = self.numbers[:SUMMED], self.numbers[4], self.numbers[5]
        self._edges = torch.zeros_like(self.numbers[:2])  # the cap and 0
        self._nan = self.numbers.new_full((), float("nan"))  # a Python number would cost a fill at every step
        self._cap: Tensor | None = None  # the cap that is in ``_edges``

    def add(self, beta: Tensor, cap: Tensor, active: Tensor) -> None:
        """Add one step. It takes six operations for any number of tensors, and one more if ``cap`` has changed.

        Args:
            beta: ``[tensors]``, beta_t clipped to [0, cap], so that clipped values equal the bounds.
            cap: ``[tensors]``, the cap of beta_t.
            active: ``[tensors]`` bool, True for tensors that take part in the step.
        """
        if cap is not self._cap or (cap.device.type == "cuda" and is_capturing(cap.device)):
            self._edges[0].copy_(cap)
            self._cap = cap
        taken = torch.where(active, beta, self._nan)  # fmin and fmax ignore nan
        torch.fmin(self._lowest, taken, out=self._lowest)
        torch.fmax(self._highest, taken, out=self._highest)
        self._totals.addcmul_(torch.cat([beta[None], self._edges == beta, active[None]]), active)

    def take(self) -> Tensor:
        """Return the numbers, ``[6, tensors]``, and reset them."""
        taken = self.numbers.clone()
        emptied(self.numbers)
        return taken


class StepStats:
    """Statistics of the steps of an optimizer.

    They are the counts of skipped steps, the first row whose sums were not finite in the last skipped step, the last
    gradient norm, and beta_t of all steps since each of several readers read it.
    """

    def __init__(self) -> None:
        self.skipped = torch.zeros((), dtype=torch.bool, device="cpu")  # whether the last step was skipped
        self.grad_norm: Tensor | None = None  # set by clip_grad_norm_
        # Skipped steps, consecutive ones, the first bad row, consecutive ones before the current training step
        self._counts = torch.zeros(4, dtype=torch.int64, device="cpu")
        self._readers = IntervalReaders()
        self._tallies: dict[Hashable, BetaTally] = {}  # keys are names: layouts keep parameters alive
        self._of_layout: dict[ShardLayout, BetaTally] = {}

    def observe(
        self, decision: Decision, cap: Tensor, tally: BetaTally, positions: Tensor | None = None, *, again: bool = False
    ) -> None:
        """Add the decision of one step. It works in place, so that a captured graph keeps its addresses.

        Args:
            decision: the decision of the step.
            cap: ``[rows]``, the cap of beta_t.
            tally: the tally of the step's layout.
            positions: ``[rows]``, indices of the decision's rows among all tensors, or None if they are all tensors
                (default: None).
            again: whether this is a further call of a training step that an engine makes in several calls (default:
                False). Such a training step counts as skipped if any of its calls is.
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
                first_bad = positions.index_select(0, first_bad.reshape(1)).reshape(())  # positions[...] would sync
            bad_row.copy_(torch.where(decision.skipped & ~before, first_bad, bad_row))
        self.skipped.copy_(now)
        tally.add(decision.beta, cap, decision.active)

    def observe_dropped(self) -> None:
        """Count a training step that an engine dropped before it called the optimizer. The first bad row is -1."""
        total, run, bad_row, _ = self._counts.unbind()
        total.add_(1)
        run.add_(1)
        bad_row.fill_(-1)
        self.skipped.fill_(True)

    def buffers(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the counts, ``[4]``, and the 0-dim ``skipped``, for a kernel that updates them as ``observe`` does."""
        if self.skipped.device != device:
            self.skipped, self._counts = self.skipped.to(device), self._counts.to(device)
        return self._counts, self.skipped

    def numbers(self, like: Tensor) -> Tensor:
        """Return ``[4]``: skipped steps, consecutive ones until now, index of first bad row, gradient norm or nan."""
        norm = like.new_full((), float("nan")) if self.grad_norm is None else self.grad_norm
        return torch.cat([self._counts[:3].to(like), norm.reshape(1).to(like)])

    # ------------------------------------------------------------------ beta_t over intervals
    def tally_of(self, layout: ShardLayout, like: Tensor) -> BetaTally:
        """Return the tally of ``layout``, in the dtype and on the device of ``like``."""
        found = self._of_layout.get(layout)
        if found is None:
            names = tuple(logical.name for logical in layout.logical_params)
            kind = names, like.dtype, like.device, type(like)  # the type tells fake tensors apart
            found = self._tallies.get(kind) or BetaTally(names, like)
            self._tallies[kind] = self._of_layout[layout] = found
        return found

    def forget_layouts(self) -> None:
        """Forget the layouts, which are rebuilt. Their tallies are kept until they are read."""
        self._of_layout = {}

    def begin_interval(self, reader: Any, *, unread: bool = False) -> None:
        """Begin an interval for ``reader``. With ``unread`` it includes the steps that nobody has read."""
        if not unread:
            self._empty_tallies()
        self._readers.begin(reader)

    def interval(self, reader: Any, names: Sequence[str]) -> Tensor:
        """Return the ``Interval`` since the last read of ``reader``, ``[6, names]``.

        A new reader gets the steps that nobody has read.
        """
        if reader not in self._readers:
            self.begin_interval(reader, unread=True)
        self._empty_tallies()
        return self._readers.take(reader, names)

    def _empty_tallies(self) -> None:
        for kind, tally in self._tallies.items():
            self._readers.give(kind, tally.names, tally.take())
        in_use = set(map(id, self._of_layout.values()))
        self._tallies = {kind: tally for kind, tally in self._tallies.items() if id(tally) in in_use}
