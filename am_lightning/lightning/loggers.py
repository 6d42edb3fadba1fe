"""One optimizer's momentum in any Lightning logger."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import am_lightning.lightning.compat as pl
from am_lightning.lightning.compat import TensorBoardLogger
from am_lightning.loggers.reader import StatsReader
from am_lightning.optim.base import AdaptiveMemoryOptimizer


class StatsLogger(StatsReader):
    """Writes what was read: scalars to every logger, layers and the histogram to TensorBoard only."""

    def __init__(self, optimizer: AdaptiveMemoryOptimizer, prefix: str, *, per_layer: bool, histogram: bool) -> None:
        super().__init__(optimizer, prefix)
        self.per_layer, self.histogram = per_layer, histogram
        self._arranged = self._described = False

    def log(self, loggers: Sequence[pl.Logger], step: int) -> None:
        """Write what ``read`` found to every logger."""
        scalars = self.scalars()
        for logger in loggers:
            layers = isinstance(logger, TensorBoardLogger) and self.per_layer
            logger.log_metrics(scalars | self.layers() if layers else scalars, step=step)
            if isinstance(logger, TensorBoardLogger) and self.histogram:
                self.add_histogram(logger.experiment, step)

    @staticmethod
    def arrange(readers: Sequence[StatsLogger], loggers: Sequence[pl.Logger], strategy: Any) -> None:
        """Once, in TensorBoard: a Custom Scalars page that overlays the layers, and a text card for each optimizer.

        An optimizer that has made no step has no card yet: its layout would be built here, which is collective.
        """
        boards = [logger.experiment for logger in loggers if isinstance(logger, TensorBoardLogger)]
        if not all(reader._arranged for reader in readers):
            pages: dict[str, Any] = {}
            for reader in readers:
                pages |= reader.stats.custom_scalars()
                reader._arranged = True
            for board in boards:
                board.add_custom_scalars(pages)
        for reader in readers:
            if not reader._described and reader.optimizer.layout is not None:
                reader._described = True
                for board in boards:
                    board.add_text(f"{reader.prefix}/summary", reader.card(type(strategy).__name__))
