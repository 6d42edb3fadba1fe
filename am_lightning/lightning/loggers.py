"""Write an optimizer's momentum to any Lightning logger."""

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
    """Write scalars to every logger, the heat map to loggers of pictures, layers and the histogram to TensorBoard.

    Args:
        optimizer: the optimizer to read.
        prefix: prefix of the tags.
        per_layer: write curves of each layer if there are at most 32 layers; "all": for any number of layers.
        histogram: write the histogram of beta_t over the tensors.
    """

    def __init__(
        self, optimizer: AdaptiveMemoryOptimizer, prefix: str, *, per_layer: bool | Literal["all"], histogram: bool
    ) -> None:
        super().__init__(optimizer, prefix)
        self.per_layer, self.histogram = per_layer, histogram
        self._described = False

    def log(self, loggers: Sequence[pl.Logger], step: int, where: str, total: int | None = None) -> None:
        """Write the values of the last ``read`` to every logger, and once a table of the optimizer to TensorBoard.

        Args:
            loggers: Lightning loggers.
            step: step on the loggers' axis.
            where: name of the strategy.
            total: number of steps of the run. None: unknown.
        """
        scalars = self.scalars()
        per_layer = self.per_layer == "all" or (self.per_layer and self.few_layers())
        describes = not self._described and self.optimizer.layout is not None  # None before the first step
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
        """Write the heat map of the layers to the loggers that accept pictures."""
        self.draw([partial(log_image, logger) for logger in loggers], step)
