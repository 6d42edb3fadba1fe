"""A regression that overshoots, so that many beta_t lie strictly between 0 and the cap."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tests.device import ACCELERATOR

BATCH = 16


def make_net(width: int = 24) -> nn.Sequential:
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(
        nn.Linear(6, width), nn.LayerNorm(width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1)
    )
    for param in net.parameters():
        with torch.no_grad():
            param.uniform_(-0.3, 0.3, generator=generator)
    return net


def batch_of(step: int) -> tuple[Tensor, Tensor]:
    """Return the global batch of a step, ``[16, 6]`` and ``[16, 1]``."""
    generator = torch.Generator().manual_seed(1000 + step % 5)
    x = torch.randn(BATCH, 6, generator=generator)
    return x, (x**2).sum(1, keepdim=True) / 3 - 2


class Regression(pl.LightningModule):
    """AdamW with decay and no-decay groups and a jumping learning rate; records every step's momentum."""

    def __init__(self, lr: float = 0.05, width: int = 24, batches: int = 20) -> None:
        super().__init__()
        self.net = make_net(width)
        self.lr, self.batches = lr, batches
        self.seen: list[dict[str, float]] = []
        self.losses: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        x, y = batch_of(self.trainer.global_step)  # not batch_idx: a resumed Trainer starts its loader again
        rank, world = self.trainer.global_rank, self.trainer.world_size
        x, y = x.chunk(world)[rank], y.chunk(world)[rank]
        loss = F.mse_loss(self.net(x.to(self.net[0].weight)), y.to(self.net[0].weight))
        self.losses.append(float(loss.detach()))
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self):
        matrices = [p for p in self.parameters() if p.ndim > 1]
        vectors = [p for p in self.parameters() if p.ndim <= 1]
        optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
            lr=self.lr,
            betas=(0.9, 0.95),
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step % 3 else 0.3)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def train_dataloader(self) -> DataLoader:
        return DataLoader(torch.arange(self.batches), batch_size=None)

    def on_train_batch_end(self, outputs, batch, batch_idx) -> None:
        momentum = getattr(self.trainer.optimizers[0], "momentum", None)
        if momentum is not None:
            self.seen.append({name: float(beta) for name, beta in momentum().items()})


def quiet(**options):
    """Return the Trainer arguments of a small run."""
    return {
        "accelerator": ACCELERATOR,
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        **options,
    }


def interior_share(seen: list[dict[str, float]], cap: float) -> float:
    """Return the share of the betas after the first step that lie strictly between 0 and the cap."""
    betas = [beta for step in seen[1:] for beta in step.values()]
    return sum(1e-6 < beta < cap - 1e-6 for beta in betas) / len(betas)
