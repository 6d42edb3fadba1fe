"""Add the configuration, a row on the HParams page and a Custom Scalars page to the curves in TensorBoard."""

from __future__ import annotations

from typing import Any

import lightning as L
import yaml
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from am_lightning.loggers.custom_scalars import add_custom_scalars
from am_lightning.pretrain.callbacks.throughput import TrainingMonitor
from am_lightning.pretrain.commands.list import strategy_name
from am_lightning.pretrain.model.shape import LlamaShape, count_parameters

FINAL = ("final/val_loss", "final/val_perplexity")
# Result columns of the HParams page, which shows the newest point of each curve.
_RESULTS = (*FINAL, "val/loss", "train/loss", "throughput/tokens_per_second")
_MFU = "model FLOPs utilization"
_LAYOUT: dict[str, dict[str, list[object]]] = {
    "training": {
        "loss": ["Multiline", ["^(train|val)/loss$"]],
        "perplexity": ["Multiline", ["^(train|val)/perplexity$"]],
        "gradient norm, before clipping": ["Multiline", [".*grad_norm$"]],
        "learning rate": ["Multiline", ["^lr-.*"]],
        "steps skipped so far": ["Multiline", [".*skipped_steps$"]],
    },
    "throughput": {
        "tokens per second, all processes": ["Multiline", ["^throughput/tokens_per_second$"]],
        "TFLOP/s per device": ["Multiline", ["^throughput/tflops_per_device$"]],
        _MFU: ["Multiline", ["^throughput/mfu$"]],
    },
}


class SaveRunConfig(SaveConfigCallback):
    """Writes config.yaml beside the event file, and adds it as a text card and as a row on the HParams page."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Write nothing yet: a resume that is refused must not change the configuration of the run."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the configuration after the checkpoint is loaded."""
        super().setup(trainer, pl_module, "fit")

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        text = self.parser.dump(self.config, skip_none=False)
        for board in _boards(trainer):
            board.add_text("config", "".join(f"    {line}\n" for line in text.splitlines()))
            settings = main_settings(yaml.safe_load(text), trainer.world_size, str(trainer.precision))
            experiment, start, _ = hparams(settings, dict.fromkeys(_RESULTS, 0.0))  # type: ignore[no-untyped-call]
            # torch's add_hparams would write a second run, with results.
            writer = board._get_file_writer()  # type: ignore[no-untyped-call]
            writer.add_summary(experiment)
            writer.add_summary(start)


class TensorBoardLayout(Callback):
    """Arranges TensorBoard's Custom Scalars page, and logs `final/val_loss` of the validation after the last step."""

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Add the page after on_train_start of TrainingMonitor, which sets peak_flops."""
        pages = {title: dict(charts) for title, charts in _LAYOUT.items()}
        if not any(isinstance(c, TrainingMonitor) and c.peak_flops for c in trainer.callbacks):  # type: ignore[attr-defined]
            del pages["throughput"][_MFU]
        for board in _boards(trainer):
            add_custom_scalars(board, pages)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the validation after a fit. `validate` on the command line has no logger."""
        for board in _boards(trainer) if trainer.state.fn == "validate" else []:
            for tag, name in zip(FINAL, ("val/loss", "val/perplexity"), strict=True):
                board.add_scalar(tag, float(trainer.callback_metrics[name]), trainer.global_step)
            board.flush()


def main_settings(config: dict[str, Any], world_size: int, precision: str) -> dict[str, bool | int | float | str]:
    """Return the settings that matter in a comparison of runs, from a resolved configuration of `fit`."""
    model, data, trainer = config["model"], config["data"], config["trainer"]
    optimizer = model["optimizer"]
    arguments = optimizer.get("init_args") or {}
    betas = arguments.get("betas") or (None, None)
    found: dict[str, Any] = {
        "optimizer": optimizer["class_path"].rpartition(".")[2],
        **{key: arguments.get(key) for key in ("lr", "lambd", "scope")},
        **dict(zip(("beta1", "beta2"), betas, strict=True)),
        **{key: model.get(key) for key in ("weight_decay", "schedule", "warmup_fraction", "seq_len")},
        "parameters": count_parameters(LlamaShape.among(model)),
        **{key: data.get(key) for key in ("source", "batch_size")},
        "max_steps": trainer.get("max_steps"),
        "strategy": strategy_name(trainer.get("strategy")),
        "precision": precision,
        "processes": world_size,
        "seed": config.get("seed_everything"),
    }
    return {key: value for key, value in found.items() if isinstance(value, bool | int | float | str)}


def _boards(trainer: L.Trainer) -> list[SummaryWriter]:
    """Return the writers of the first rank; the other ranks write nothing."""
    loggers = trainer.loggers if trainer.is_global_zero else []
    return [logger.experiment for logger in loggers if isinstance(logger, TensorBoardLogger)]
