"""One optimizer's momentum in any Lightning logger."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal

import am_lightning.lightning.compat as pl
from am_lightning.lightning.compat import TensorBoardLogger
from am_lightning.loggers.custom_scalars import add_momentum
from am_lightning.loggers.images import log_image
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
        self._described = False

    def log(self, loggers: Sequence[pl.Logger], step: int, where: str, total: int | None = None) -> None:
        """Write what ``read`` found to every logger, and to TensorBoard once what the optimizer does.

        Args:
            where: the strategy's name.
            total: steps of the run, where they are known.
        """
        scalars = self.scalars()
        per_layer = self.per_layer == "all" or (self.per_layer and self.few_layers())
        describes = not self._described and self.optimizer.layout is not None  # else it has made no step yet
        self._described |= describes
        for logger in loggers:
            if not isinstance(logger, TensorBoardLogger):
                logger.log_metrics(scalars, step=step)
                continue
            logger.log_metrics(scalars | (self.layers() if per_layer else {}), step=step)
            add_momentum(logger.experiment, self, step)
            if describes:
                logger.experiment.add_text(f"{self.prefix}/summary", self.card(where))
            if self.histogram:
                self.add_histogram(logger.experiment, step)
        if self.history.picture_is_due(total):
            self.draw_in(loggers, step)

    def draw_in(self, loggers: Sequence[pl.Logger], step: int) -> None:
        """The heat map of the layers, in loggers that take pictures."""
        self.draw([partial(log_image, logger) for logger in loggers], step)
