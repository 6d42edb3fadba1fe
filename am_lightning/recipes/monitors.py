"""Callbacks that watch a run: Lightning's ThroughputMonitor for rows of tokens, and a clock for the summary."""

from __future__ import annotations

import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, ThroughputMonitor


class TokenThroughput(ThroughputMonitor):
    """Lightning's ThroughputMonitor for batches of token ids (rows, tokens).

    Logs `train/device/items_per_sec` (tokens), `train/device/flops_per_sec`, `train/device/mfu` where the device's peak
    is known, and more, as means over a window.

    Args:
        window_size: steps that a mean goes over.
    """

    def __init__(self, window_size: int = 50) -> None:
        super().__init__(batch_size_fn=len, length_fn=_tokens, window_size=window_size)

    def _compute(self, trainer: L.Trainer, iter_num: int | None = None) -> None:
        if trainer.training:  # validation batches would be points at steps 1, 2, ... of the training's axis
            super()._compute(trainer, iter_num)


def _tokens(batch: Any) -> int:
    return int(batch.numel())


class TrainingClock(Callback):
    """Seconds and optimizer steps of the training in this process, with and without the validations within it."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.validation_seconds = 0.0
        self.steps = 0
        self._start = self._validation_start = 0.0

    @property
    def steps_per_second(self) -> float | None:
        """Without the validations; None where no step was taken."""
        training = self.seconds - self.validation_seconds
        return self.steps / training if self.steps and training > 0 else None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.steps = -trainer.global_step
        self._start = time.perf_counter()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._validation_start = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self.validation_seconds += time.perf_counter() - self._validation_start

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seconds = time.perf_counter() - self._start
        self.steps += trainer.global_step
