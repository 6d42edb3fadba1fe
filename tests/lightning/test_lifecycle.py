"""The callback around fit: failed fits, second fits, pickles, checkpoints after fit, fused AdamW, GradScaler."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import CSVLogger

from am_lightning import AdaptiveMemory, AMAdamW
from am_lightning.optim.convert import convert_adamw
from tests.lightning.model import Regression, batch_of, make_net, quiet


class Failing(Regression):
    def training_step(self, batch, batch_idx):
        raise RuntimeError("on purpose")


class WithSGD(Regression):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize(("first", "error"), [(Failing, RuntimeError), (WithSGD, MisconfigurationException)])
def test_after_a_fit_that_raised_the_next_is_converted(first, error) -> None:
    callback = AdaptiveMemory(beta1_max=0.5)
    failed = first()
    with pytest.raises(error):
        pl.Trainer(**quiet(max_steps=1, callbacks=[callback])).fit(failed)
    assert "configure_optimizers" not in failed.__dict__
    trainer = pl.Trainer(**quiet(max_steps=1, callbacks=[callback]))
    trainer.fit(Regression())
    assert type(trainer.optimizers[0]) is AMAdamW
    assert trainer.optimizers[0].param_groups[0]["beta1_max"] == 0.5


def test_a_module_is_fitted_again_with_another_callback() -> None:
    module = Regression(batches=2)
    for callback, cap in ((AdaptiveMemory(), 0.89), (AdaptiveMemory(beta1_max=0.3, scope="global"), 0.3)):
        trainer = pl.Trainer(**quiet(max_steps=2, callbacks=[callback]))
        trainer.fit(module)
        assert trainer.optimizers[0].param_groups[0]["beta1_max"] == pytest.approx(cap)
    assert trainer.optimizers[0].scope == "global"


class Sometimes(Regression):
    """Step by hand in every second batch only; the gradients of the given steps are NaN."""

    def __init__(self, bad_from: int = 10**9) -> None:
        super().__init__(batches=200)
        self.automatic_optimization = False
        self.bad_from = bad_from

    def training_step(self, batch, batch_idx) -> None:
        if batch_idx % 2:
            return
        x, y = batch_of(batch_idx)
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(self.net(x), y)
        self.manual_backward(loss * (float("nan") if batch_idx >= self.bad_from else 1.0))
        optimizer.step()


def test_curves_where_no_step_falls_on_the_log_interval(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    pl.Trainer(**quiet(max_steps=20, log_every_n_steps=4, logger=logger, callbacks=[AdaptiveMemory()])).fit(Sometimes())
    rows = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    assert len(rows) - 1 == 9


@pytest.mark.parametrize("bad_from", [0, 2, 6])
def test_too_many_skips_end_the_run_at_exactly_the_limit(tmp_path: Path, bad_from: int) -> None:
    trainer = pl.Trainer(
        **quiet(max_epochs=1, default_root_dir=tmp_path, callbacks=[AdaptiveMemory(max_consecutive_skips=7)])
    )
    with pytest.raises(RuntimeError, match="7 steps in a row"):
        trainer.fit(Sometimes(bad_from))
    assert trainer.global_step == bad_from // 2 + 7


def test_skips_are_in_a_checkpoint_saved_after_fit_and_not_in_the_next_fit(tmp_path: Path) -> None:
    callback = AdaptiveMemory()
    trainer = pl.Trainer(**quiet(max_steps=5, callbacks=[callback]))
    trainer.fit(Sometimes(bad_from=6))
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    saved = torch.load(tmp_path / "after.ckpt", weights_only=False)["callbacks"]["AdaptiveMemory"]
    assert saved["skipped_steps"] == [2]
    trainer = pl.Trainer(**quiet(max_steps=6, callbacks=[callback]))
    trainer.fit(Sometimes(), ckpt_path=tmp_path / "after.ckpt", weights_only=False)
    assert callback.state_dict()["skipped_steps"] == [2]
    pl.Trainer(**quiet(max_steps=2, callbacks=[callback])).fit(Sometimes())
    assert callback.state_dict()["skipped_steps"] == [0]


def test_a_run_of_fused_adamw_resumes_with_the_callback(tmp_path: Path) -> None:
    class Fused(Regression):
        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=0.05, fused=True)

    trainer = pl.Trainer(**quiet(max_steps=3))
    trainer.fit(Fused())
    trainer.save_checkpoint(tmp_path / "adamw.ckpt")
    trainer = pl.Trainer(**quiet(max_steps=6, callbacks=[AdaptiveMemory()]))
    trainer.fit(Fused(), ckpt_path=tmp_path / "adamw.ckpt", weights_only=False)
    (group,) = trainer.optimizers[0].param_groups
    assert (type(trainer.optimizers[0]), group["fused"], group["beta1_max"]) == (AMAdamW, True, pytest.approx(0.89))
    assert all(float(state["step"]) == 6 for state in trainer.optimizers[0].state.values())


def test_gradscaler_unscales_before_a_converted_fused_adamw() -> None:
    states = []
    for scale in (1.0, 1024.0):
        net = make_net()
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.05, fused=True)
        convert_adamw(optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=100)
        for index in range(4):
            x, y = batch_of(index)
            optimizer.zero_grad()
            scaler.scale(torch.nn.functional.mse_loss(net(x), y)).backward()
            scaler.step(optimizer)
            scaler.update()
        states.append([optimizer.state[p]["exp_avg"] for p in net.parameters()])
    for plain, scaled in zip(*states, strict=True):
        torch.testing.assert_close(scaled, plain)
