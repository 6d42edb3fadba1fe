"""Clipping by norm in one process: which optimizers and plugins it is replaced for, and that fit restores it."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision, Precision

from am_lightning import AdaptiveMemory
from tests.lightning.model import Regression, batch_of, quiet

CLIP = 0.5


def norm_of(parameters) -> float:
    return float(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))


class Two(Regression):
    """Clip AdamW of the first layers and SGD of the last one by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.norms: list[tuple[float, float]] = []

    def configure_optimizers(self):
        return [
            torch.optim.SGD(self.net[3:].parameters(), lr=0.01),
            torch.optim.AdamW(self.net[:3].parameters(), lr=0.05),
        ]

    def training_step(self, batch, batch_idx) -> None:
        x, y = batch_of(batch_idx)
        optimizers = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(10 * torch.nn.functional.mse_loss(self.net(x), y))
        for optimizer in optimizers:
            self.clip_gradients(optimizer, gradient_clip_val=CLIP, gradient_clip_algorithm="norm")
        self.norms.append((norm_of(self.net[3:].parameters()), norm_of(self.net[:3].parameters())))
        for optimizer in optimizers:
            optimizer.step()


def test_each_optimizer_by_its_own_norm(tmp_path: Path) -> None:
    """SGD is clipped by Lightning as before; only our optimizer has am/grad_norm."""
    module, logger = Two(), CSVLogger(tmp_path)
    trainer = pl.Trainer(**quiet(max_steps=8, callbacks=[AdaptiveMemory()], logger=logger, log_every_n_steps=1))
    trainer.fit(module)
    assert max(max(pair) for pair in module.norms) <= CLIP * (1 + 1e-5)
    assert {type(optimizer).__name__ for optimizer in trainer.optimizers} == {"SGD", "AMAdamW"}
    header = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()[0].split(",")
    assert "am/grad_norm" in header and not any(tag.startswith("am-1/") for tag in header)


class Own(Precision):
    """A plugin that clips by norm in its own way."""

    calls = 0

    def clip_grad_by_norm(self, optimizer, clip_val) -> None:
        Own.calls += 1
        super().clip_grad_by_norm(optimizer, clip_val)


def test_a_plugins_own_clipping_stays() -> None:
    trainer = pl.Trainer(**quiet(max_steps=3, callbacks=[AdaptiveMemory()], plugins=[Own()], gradient_clip_val=CLIP))
    trainer.fit(Regression())
    assert Own.calls == 3
    assert trainer.optimizers[0].report()[-1].isnan()  # our clipping has set no norm


class Inspect(pl.Callback):
    """The plugin can be copied and pickled inside fit, and the copies clip as Lightning's plugin does."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        plugin = trainer.precision_plugin
        for other in (copy.deepcopy(plugin), pickle.loads(pickle.dumps(plugin))):
            assert other.clip_grad_by_norm.__func__ is Precision.clip_grad_by_norm
            other.clip_gradients(optimizer, 1e-3)
            assert norm_of(pl_module.parameters()) <= 1e-3 * (1 + 1e-5)


class Failing(Regression):
    def training_step(self, batch, batch_idx):
        raise RuntimeError("on purpose")


def test_nothing_is_left_after_fit_or_an_exception() -> None:
    plugin = MixedPrecision("bf16-mixed", "cpu")
    trainer = pl.Trainer(**quiet(max_steps=2, callbacks=[AdaptiveMemory(), Inspect()], plugins=[plugin]))
    own = Precision.clip_grad_by_norm
    trainer.fit(Regression())
    assert Precision.clip_grad_by_norm is own
    failing = pl.Trainer(**quiet(max_steps=2, callbacks=[AdaptiveMemory()], plugins=[plugin]))
    with pytest.raises(RuntimeError, match="on purpose"):
        failing.fit(Failing())
    assert Precision.clip_grad_by_norm is own


def test_a_module_without_clipping_has_no_grad_norm(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    pl.Trainer(**quiet(max_steps=2, callbacks=[AdaptiveMemory()], logger=logger, log_every_n_steps=1)).fit(Regression())
    assert "am/grad_norm" not in (Path(logger.log_dir) / "metrics.csv").read_text()
