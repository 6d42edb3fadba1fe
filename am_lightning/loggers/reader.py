"""One optimizer's momentum, read from the device once and turned into scalars: what every framework's logger gets."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from am_lightning.loggers.metrics import MomentumReport
from am_lightning.optim.base import AdaptiveMemoryOptimizer


def prefix_of(index: int) -> str:
    """What the tags of the optimizer at ``index``, from 0, start with: am, am-1, am-2, ..."""
    return f"am-{index}" if index else "am"


class Readings:
    """beta_t and skipped steps of ``optimizer`` under tags that start with ``prefix``.

    Attributes:
        skipped_before: steps skipped before this process started, from a checkpoint.
        skipped_in_a_row: up to the last ``read``.
        first_bad: the parameter whose sum was not finite in the last skipped step.
        betas: ``[tensors]`` on the CPU, nan for tensors that have never stepped.
    """

    def __init__(self, optimizer: AdaptiveMemoryOptimizer, prefix: str = "am") -> None:
        self.optimizer, self.prefix = optimizer, prefix
        self.skipped_before = 0
        self.skipped_in_a_row = 0
        self.first_bad = ""
        self.betas = torch.empty(0, device="cpu")
        self._skipped = 0
        self._warned_of = 0
        self._grad_norm = math.nan
        self._report: MomentumReport | None = None

    def read(self) -> None:
        """The one copy from device to host."""
        numbers = self.optimizer.report().cpu()
        self.betas, counts = numbers[:-4], numbers[-4:].tolist()
        self._skipped, self.skipped_in_a_row = int(counts[0]), int(counts[1])
        self._grad_norm = counts[3]
        names = self.optimizer.parameter_names()
        self.first_bad = names[int(counts[2])] if names else ""
        if self._report is None or self._report.names != names:  # a group was added
            self._report = MomentumReport(names, self.optimizer.caps(), self.prefix)

    @property
    def report(self) -> MomentumReport:
        """How the tensors are grouped; known after the first ``read``."""
        assert self._report is not None
        return self._report

    def stepped(self) -> torch.Tensor:
        """``[tensors that have stepped]`` beta_t."""
        return self.betas[~self.betas.isnan()]

    def has_names(self) -> bool:
        """Parameters are called otherwise than ``group.index``."""
        return not all(name.replace(".", "").isdigit() for name in self.report.names)

    def scalars(self) -> dict[str, float]:
        """Tag -> value of what ``read`` found: ``<prefix>/beta/...``, ``/clamp/...``, ``/skipped_steps``,
        ``/grad_norm`` where ``clip_grad_norm_`` ran."""
        scalars = self.report.scalars(self.betas)
        scalars[f"{self.prefix}/skipped_steps"] = float(self.skipped_before + self._skipped)
        if not math.isnan(self._grad_norm):
            scalars[f"{self.prefix}/grad_norm"] = self._grad_norm
        return scalars

    def card(self, where: str) -> str:
        """Markdown: scope, lambda, caps, rows and how they are reduced.

        Args:
            where: the strategy or framework, for the headline.
        """
        groups, key = self.optimizer.param_groups, self.optimizer.cap_key
        lines = [
            f"**{type(self.optimizer).__name__}** under {where}",
            f"scope | {self.optimizer.scope}",
            f"lambda | {_several(group['lambd'] for group in groups)}",
            f"cap of beta_t ({key}) | {_several(group[key] for group in groups)}",
            f"rows | {self.optimizer.describe()}",
        ]
        head, *rows = lines
        return "\n".join([head, "", "| | |", "|---|---|", *(f"| {row} |" for row in rows)])

    def newly_skipped(self) -> int:
        """Steps skipped since the last warning."""
        return self._skipped - self._warned_of

    def skip_warning(self) -> str:
        """The warning for this log interval; the next counts from here."""
        new, self._warned_of = self.newly_skipped(), self._skipped
        return (
            f"{self.prefix}: {new} step{'s' if new > 1 else ''} since the last report dropped, because a sum over "
            f"gradients was not finite (first in {self.first_bad!r}). Nothing was written; {self._skipped} in all."
        )

    def skipped_in_all(self) -> int:
        """Steps skipped by this run and those it resumed from."""
        return self.skipped_before + int(self.optimizer.report()[-4])


def _several(values: Iterable[float]) -> str:
    return ", ".join(f"{value:g}" for value in sorted(set(values)))
