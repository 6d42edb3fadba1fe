"""Under DeepSpeed with gradient accumulation: divide the loss once."""

from __future__ import annotations

import functools

import lightning as L
from lightning.pytorch.strategies import DeepSpeedStrategy


class LossDividedOnce(L.Callback):
    """Tells DeepSpeed's engine not to divide the loss by the micro-batches of a step.

    Lightning (2.6) divides it already, and DeepSpeed (0.19) would again. The gradients would be too small by that
    factor, and clipping and beta_t other ones. Nothing to do under other strategies.
    """

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if isinstance(trainer.strategy, DeepSpeedStrategy):
            engine = trainer.strategy.deepspeed_engine
            engine.backward = functools.partial(engine.backward, scale_wrt_gas=False)
