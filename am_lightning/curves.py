"""One optimizer's momentum curves: read from the device once, written to any Lightning logger."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch.loggers import Logger, TensorBoardLogger

from am_lightning.momentum import MomentumReport
from am_lightning.optim.base import AdaptiveMemoryOptimizer


class Curves:
    """beta_t and skipped steps of ``optimizer`` under tags that start with ``prefix``.

    Attributes:
        skipped_before: steps skipped before this process started, from a checkpoint.
        skipped_in_a_row: up to the last :meth:`read`.
    """

    def __init__(self, optimizer: AdaptiveMemoryOptimizer, prefix: str, *, per_layer: bool, histogram: bool) -> None:
        self.optimizer, self.prefix = optimizer, prefix
        self.per_layer, self.histogram = per_layer, histogram
        self.skipped_before = 0
        self.skipped_in_a_row = 0
        self.first_bad = ""
        self._betas = torch.empty(0)
        self._skipped = 0
        self._warned_of = 0
        self._grad_norm = math.nan
        self._report: MomentumReport | None = None
        self._arranged = False

    def read(self) -> None:
        """The one copy from device to host."""
        numbers = self.optimizer.report().cpu()
        self._betas, counts = numbers[:-4], numbers[-4:].tolist()
        self._skipped, self.skipped_in_a_row = int(counts[0]), int(counts[1])
        self._grad_norm = counts[3]
        names = self.optimizer.parameter_names()
        self.first_bad = names[int(counts[2])]
        if self._report is None or self._report.names != names:  # a group was added
            self._report = MomentumReport(names, self.optimizer.caps(), self.prefix)

    def log(self, loggers: Sequence[Logger], step: int) -> None:
        """Write what :meth:`read` found to every logger; layers and the histogram to TensorBoard only."""
        assert self._report is not None
        scalars = self._report.scalars(self._betas)
        scalars[f"{self.prefix}/skipped_steps"] = float(self.skipped_before + self._skipped)
        if not math.isnan(self._grad_norm):
            scalars[f"{self.prefix}/grad_norm"] = self._grad_norm
        for logger in loggers:
            layers = isinstance(logger, TensorBoardLogger) and self.per_layer
            logger.log_metrics(scalars | self._report.layers(self._betas) if layers else scalars, step=step)
            if isinstance(logger, TensorBoardLogger) and self.histogram:
                seen = self._betas[~self._betas.isnan()]
                if seen.numel():
                    logger.experiment.add_histogram(f"{self.prefix}/beta", seen, step)

    @staticmethod
    def arrange(all_curves: Sequence[Curves], loggers: Sequence[Logger], strategy: Any) -> None:
        """Once, in TensorBoard: a Custom Scalars page that overlays the layers, and a text card for each optimizer."""
        if all(curves._arranged for curves in all_curves):
            return
        pages: dict[str, Any] = {}
        for curves in all_curves:
            assert curves._report is not None
            pages |= curves._report.custom_scalars()
            curves._arranged = True
        for logger in loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_custom_scalars(pages)
                for curves in all_curves:
                    logger.experiment.add_text(f"{curves.prefix}/summary", curves.card(type(strategy).__name__))

    def card(self, strategy: str) -> str:
        """Markdown: scope, lambda, caps, rows and how they are reduced."""
        groups, key = self.optimizer.param_groups, self.optimizer.cap_key
        lines = [
            f"**{type(self.optimizer).__name__}** under {strategy}",
            f"scope | {self.optimizer.scope}",
            f"lambda | {_several(group['lambd'] for group in groups)}",
            f"cap of beta_t ({key}) | {_several(group[key] for group in groups)}",
            f"rows | {self.optimizer.current_layout().describe()}",
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


def _several(values: Any) -> str:
    return ", ".join(f"{value:g}" for value in sorted(set(values)))
