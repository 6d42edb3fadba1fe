"""Progress bars with the loss, tokens per second and the mean of beta_t. The setting `progress_bar` selects one."""

from __future__ import annotations

import lightning as L
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar, TQDMProgressBar

from am_lightning.loggers.reader import read_report
from am_lightning.optim.unwrap import am_optimizers
from am_lightning.pretrain.callbacks.throughput import TrainingMonitor

Metrics = dict[str, int | str | float | dict[str, float]]


class _RunMetrics(ProgressBar):
    """Reads the figures behind the bar from the device when the bar is redrawn, as the loss is read then, too."""

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> Metrics:
        loss = trainer.callback_metrics.get("train/loss")  # still a tensor
        shown: Metrics = {} if loss is None else {"loss": float(loss)}
        for name, value in super().get_metrics(trainer, pl_module).items():
            shown["val" if name == "val/loss" else name] = value
        shown.pop("v_num", None)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, TrainingMonitor) and (rate := callback.tokens_per_second(trainer)):
                shown["tok/s"] = f"{rate:,.0f}"
        for optimizer in am_optimizers(trainer.optimizers)[:1]:
            betas, _ = read_report(optimizer)
            if bool((~betas.isnan()).any()):
                shown["beta"] = f"{float(betas.nanmean()):.3f}"
        return shown


class RunProgressBar(_RunMetrics, TQDMProgressBar):
    """Lightning's TQDM bar with the figures of the run, redrawn every `refresh_rate` batches."""


class RichRunProgressBar(_RunMetrics, RichProgressBar):
    """Lightning's rich bar with the figures of the run, redrawn every `refresh_rate` batches."""

    _shown: Metrics | None = None

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> Metrics:
        """Return the last figures between redraws. Lightning's rich bar calls this after every batch."""
        batches = trainer.fit_loop.batch_idx + 1
        if self._shown is None or batches % self.refresh_rate == 0 or trainer.fit_loop.epoch_loop._is_training_done:
            self._shown = super().get_metrics(trainer, pl_module)
        return self._shown


BARS: dict[str, type[RunProgressBar] | type[RichRunProgressBar]] = {"tqdm": RunProgressBar, "rich": RichRunProgressBar}
