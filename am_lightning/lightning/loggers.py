"""One optimizer's momentum curves in any Lightning logger."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from am_lightning.lightning.compat import TensorBoardLogger
from am_lightning.loggers.reader import Readings
from am_lightning.optim.base import AdaptiveMemoryOptimizer

if TYPE_CHECKING:
    from am_lightning.lightning.compat import Logger


class Curves(Readings):
    """Writes what was read: scalars to every logger, layers and the histogram to TensorBoard only."""

    def __init__(self, optimizer: AdaptiveMemoryOptimizer, prefix: str, *, per_layer: bool, histogram: bool) -> None:
        super().__init__(optimizer, prefix)
        self.per_layer, self.histogram = per_layer, histogram
        self._arranged = self._described = False

    def log(self, loggers: Sequence[Logger], step: int) -> None:
        """Write what ``read`` found to every logger."""
        scalars = self.scalars()
        for logger in loggers:
            layers = isinstance(logger, TensorBoardLogger) and self.per_layer
            logger.log_metrics(scalars | self.report.layers(self.betas) if layers else scalars, step=step)
            if isinstance(logger, TensorBoardLogger) and self.histogram:
                seen = self.stepped()
                if seen.numel():
                    logger.experiment.add_histogram(f"{self.prefix}/beta", seen, step)

    @staticmethod
    def arrange(all_curves: Sequence[Curves], loggers: Sequence[Logger], strategy: Any) -> None:
        """Once, in TensorBoard: a Custom Scalars page that overlays the layers, and a text card for each optimizer.

        An optimizer that has made no step has no card yet: its layout would be built here, which is collective.
        """
        boards = [logger.experiment for logger in loggers if isinstance(logger, TensorBoardLogger)]
        if not all(curves._arranged for curves in all_curves):
            pages: dict[str, Any] = {}
            for curves in all_curves:
                pages |= curves.report.custom_scalars()
                curves._arranged = True
            for board in boards:
                board.add_custom_scalars(pages)
        for curves in all_curves:
            if not curves._described and curves.optimizer.layout is not None:
                curves._described = True
                for board in boards:
                    board.add_text(f"{curves.prefix}/summary", curves.card(type(strategy).__name__))
