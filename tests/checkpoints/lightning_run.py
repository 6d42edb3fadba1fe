"""A Trainer's run with the AdaptiveMemory callback, and the run that resumes its checkpoint."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from am_lightning import AdaptiveMemory
from tests.checkpoints.net import END, STOP, Net, rate_of
from tests.checkpoints.plain import groups_of
from tests.checkpoints.saved import (
    Betas,
    differences_of_loaded,
    differences_of_steps,
    expected_of,
    keep,
    loaded_of,
)


class Drawn(pl.LightningModule):
    """Train with a ``torch.optim.AdamW`` that the callback converts, and a schedule; save after STOP steps."""

    cap = 0.89

    def __init__(self, file: Path | None = None) -> None:
        super().__init__()
        self.net, self.file = Net(), file
        self.before: Betas = []
        self.after: Betas = []
        self.loaded: dict[str, Any] = {}

    @property
    def optimizer(self) -> Any:
        return self.trainer.optimizers[0]

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net(self.trainer.global_step)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(groups_of(self.net, named=False), lr=1.0, betas=(0.9, 0.95))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_of(step, 0.1))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(range(END), batch_size=None)  # type: ignore[arg-type]

    def on_train_start(self) -> None:
        if self.trainer.global_step == STOP:
            self.loaded = loaded_of(self)  # type: ignore[arg-type]

    def on_train_batch_end(self, *_: Any) -> None:
        step = self.trainer.global_step
        betas = {name: float(beta) for name, beta in self.optimizer.momentum().items()}
        (self.before if step <= STOP else self.after).append(betas)
        if step == STOP and self.file is not None:
            self.trainer.save_checkpoint(self.file)
            self.loaded = loaded_of(self)  # type: ignore[arg-type]

    def weights(self) -> dict[str, Tensor]:
        return {name: param.detach() for name, param in self.net.named_parameters()}

    def optimizer_state(self) -> dict[str, Any]:
        return self.optimizer.state_dict()


def fit(module: Drawn, resume: Path | None = None) -> Drawn:
    options: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False}
    options |= {"enable_progress_bar": False, "enable_model_summary": False, "max_steps": END}
    trainer = pl.Trainer(callbacks=[AdaptiveMemory()], **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about few workers
        trainer.fit(module, ckpt_path=resume, weights_only=True if resume else None)
    return module


def save(folder: Path) -> None:
    (folder / "checkpoint").mkdir()
    module = fit(Drawn(folder / "checkpoint" / "saved.ckpt"))
    keep(folder, 0, module.loaded, module.before, module.after, module)  # type: ignore[arg-type]


def resume(folder: Path) -> list[str]:
    expected = expected_of(folder)
    module = fit(Drawn(), folder / "checkpoint" / "saved.ckpt")
    found = differences_of_loaded(module.loaded, expected["loaded"])
    return found + differences_of_steps(module.after, module.weights(), expected)
