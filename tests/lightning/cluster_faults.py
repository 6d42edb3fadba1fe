"""Functions that each rank of a pool runs: fits that test the callback's own behaviour under a strategy."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.environments import LightningEnvironment

from am_lightning import AdaptiveMemory
from tests.lightning.cluster import Sharded, alone, compared, run, strategy_of
from tests.lightning.model import quiet
from tests.sharding.model import batch_of


def give_up(placed: str, folder: str) -> dict[str, Any]:
    """Make every step from the third on bad: all ranks end together, and the checkpoint has the last good weights."""
    kept = Weights()
    how: dict[str, Any] = {
        "bad": tuple(range(2, 8)),
        "of_callback": {"max_consecutive_skips": 3, "log_every_n_steps": 100},
    }
    try:
        run(placed, default_root_dir=folder, others=(kept,), **how)
    except RuntimeError as error:
        checkpoints = [path.name for path in Path(folder).glob("am-nonfinite-step=*.ckpt")]
        finite = all(bool(weight.isfinite().all()) for weight in kept.weights.values())
        return {"text": str(error), "checkpoints": checkpoints, "finite": finite, "steps": kept.steps}
    return {"text": "did not end"}


class Weights(pl.Callback):
    """Keep this rank's weights when the fit ends in an exception."""

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        self.steps = trainer.global_step
        self.weights = {name: param.detach().clone() for name, param in pl_module.named_parameters()}


def after_a_learning_rate_finder(placed: str) -> dict[str, Any]:
    """Fit after a LearningRateFinder, which makes (clipped) steps before our on_fit_start and must change nothing."""
    finder = Restored(min_lr=1e-4, max_lr=1e-3, num_training_steps=3, update_attr=False)
    trainer, module, watch, _, raw = run(placed, clip=0.05, others=(finder,))
    (optimizer,) = trainer.optimizers
    raw = raw[-8:]  # without the finder's steps
    return {"known": finder.known, **compared(optimizer, module, watch, raw, alone(clip=0.05))}


class Restored(LearningRateFinder):
    """Record what the optimizer knows during the finder's steps, and restore its learning rates afterwards."""

    def lr_find(self, trainer: pl.Trainer, pl_module: Any) -> None:
        (optimizer,) = trainer.optimizers
        self.known = "net.head.weight" in optimizer.parameter_names()
        rates = [group["lr"] for group in optimizer.param_groups]
        super().lr_find(trainer, pl_module)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate


class Late(Sharded):
    """Train two optimizers, the second of which makes its first step in the fourth batch."""

    def configure_optimizers(self) -> Any:
        blocks = [param for name, param in self.net.named_parameters() if name.startswith("blocks")]
        rest = [param for name, param in self.net.named_parameters() if not name.startswith("blocks")]
        return [torch.optim.AdamW(blocks, lr=0.01), torch.optim.AdamW(rest, lr=0.01)]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch_of(batch_idx, self.dtype_)
        first, second = self.optimizers()
        for optimizer in (first, second):
            optimizer.zero_grad()
        self.manual_backward(F.mse_loss(self.net(x), y))
        first.step()
        if batch_idx >= 3:
            second.step()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append({str(i): optimizer.layout is not None for i, optimizer in enumerate(self.trainer.optimizers)})


def second_optimizer_is_late(placed: str, folder: str) -> list[dict[str, bool]]:
    """Log layouts on rank zero, which must not build one alone, because it would wait for the other ranks forever."""
    world = dist.get_world_size()
    os.environ["LOCAL_RANK"] = str(dist.get_rank())
    module = Late(placed, torch.float64, scope="tensor", way="manual", optimizer="", clip=None, pieces=1, bad=())
    trainer = pl.Trainer(
        **quiet(
            devices=world,
            strategy=strategy_of(placed, world),
            plugins=[LightningEnvironment()],
            max_epochs=1,
            limit_train_batches=6,
            logger=TensorBoardLogger(folder, name="", version="run"),
            log_every_n_steps=1,
            callbacks=[AdaptiveMemory()],
        )
    )
    trainer.fit(module)
    return module.seen
