"""Divide the loss once under DeepSpeed with gradient accumulation."""

from __future__ import annotations

import functools

import lightning as L
from lightning.pytorch.strategies import DeepSpeedStrategy


class LossDividedOnce(L.Callback):
    """Keeps DeepSpeed (0.19) from dividing the loss by the number of micro-batches, which Lightning (2.6) does already.

    Gradients that are divided twice change clipping and beta_t. Other strategies are not affected.
    """

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if isinstance(trainer.strategy, DeepSpeedStrategy):
            engine = trainer.strategy.deepspeed_engine
            engine.backward = functools.partial(engine.backward, scale_wrt_gas=False)
