"""One optimizer's momentum in any Lightning logger."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import am_lightning.lightning.compat as pl
from am_lightning.lightning.compat import TensorBoardLogger
from am_lightning.lightning.images import log_image
from am_lightning.loggers.custom_scalars import add_custom_scalars
from am_lightning.loggers.reader import StatsReader
from am_lightning.optim.base import AdaptiveMemoryOptimizer


class StatsLogger(StatsReader):
    """Writes what was read: scalars to every logger, the heat map to those that take pictures, layers and the histogram
    to TensorBoard only.

    Args:
        per_layer: curves of each layer where there are few; "all": however many there are.
    """

    def __init__(
        self, optimizer: AdaptiveMemoryOptimizer, prefix: str, *, per_layer: bool | Literal["all"], histogram: bool
    ) -> None:
        super().__init__(optimizer, prefix)
        self.per_layer, self.histogram = per_layer, histogram
        self._arranged = self._described = False

    def log(self, loggers: Sequence[pl.Logger], step: int, total: int | None = None) -> None:
        """Write what ``read`` found to every logger.

        Args:
            total: steps of the run, where they are known.
        """
        scalars = self.scalars()
        per_layer = self.per_layer == "all" or (self.per_layer and self.few_layers())
        for logger in loggers:
            if not isinstance(logger, TensorBoardLogger):
                logger.log_metrics(scalars, step=step)
                continue
            logger.log_metrics(scalars | self.floor() | (self.layers() if per_layer else {}), step=step)
            if self.histogram:
                self.add_histogram(logger.experiment, step)
        if self.history.picture_is_due(total):
            self.draw_in(loggers, step)

    def draw_in(self, loggers: Sequence[pl.Logger], step: int) -> None:
        """The heat map of the layers, in loggers that take pictures."""
        self.draw([partial(log_image, logger) for logger in loggers], step)

    @staticmethod
    def arrange(readers: Sequence[StatsLogger], loggers: Sequence[pl.Logger], strategy: Any) -> None:
        """Once, in TensorBoard: a Custom Scalars page of the layer groups, and a text card for each optimizer.

        An optimizer that has made no step has no card yet: its layout would be built here, which is collective.
        """
        boards = [logger.experiment for logger in loggers if isinstance(logger, TensorBoardLogger)]
        if not all(reader._arranged for reader in readers):
            pages: dict[str, Any] = {}
            for reader in readers:
                pages |= reader.stats.custom_scalars()
                reader._arranged = True
            for board in boards:
                add_custom_scalars(board, pages)
        for reader in readers:
            if not reader._described and reader.optimizer.layout is not None:
                reader._described = True
                for board in boards:
                    board.add_text(f"{reader.prefix}/summary", reader.card(type(strategy).__name__))
