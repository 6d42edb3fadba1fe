"""Curves, skipped steps and hooks in real Trainer runs on one process."""

from __future__ import annotations

import math
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from am_lightning import AdaptiveMemory, AMAdamW
from am_lightning.lightning.loggers import StatsLogger
from tests.lightning.model import Regression, batch_of, interior_share, quiet
from tests.loggers.intervals import assert_curves, curves_of


def events(logger: TensorBoardLogger) -> EventAccumulator:
    accumulator = EventAccumulator(logger.log_dir, size_guidance={"tensors": 0, "scalars": 0})
    accumulator.Reload()
    return accumulator


def fit(module: Regression, callback: AdaptiveMemory | None = None, **options) -> pl.Trainer:
    callback = callback or AdaptiveMemory()
    trainer = pl.Trainer(**quiet(max_steps=12, log_every_n_steps=2, callbacks=[callback], **options))
    trainer.fit(module)
    return trainer


def test_curves_in_tensorboard_and_csv_are_the_momentum(tmp_path: Path) -> None:
    board, csv = TensorBoardLogger(tmp_path), CSVLogger(tmp_path)
    module = Regression()
    fit(module, logger=[board, csv])
    assert interior_share(module.seen, 0.89) > 0.2
    found = events(board)
    tags = found.Tags()
    for tag in (
        "am/beta/mean",
        "am/beta/min",
        "am/beta/max",
        "am/clamp/at_max",
        "am/clamp/at_zero",
        "am/skipped_steps",
    ):
        assert tag in tags["scalars"]
    assert {"am/beta/other", "am/beta/layer/net.0", "am/beta/layer/net.5"} <= set(tags["scalars"])
    assert tags["histograms"] == ["am/beta"]
    assert "custom_scalars__config__" in tags["tensors"]
    card = found.Tensors("am/summary/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "AMAdamW" in card and "0.89" in card and "8 tensors" in card
    mean = found.Scalars("am/beta/mean")
    assert (
        [event.step for event in mean] == [event.step for event in found.Scalars("train/loss")] == [1, 3, 5, 7, 9, 11]
    )
    expected = curves_of(module.seen, range(2, 13, 2))
    assert_curves({tag: {e.step: e.value for e in found.Scalars(tag)} for tag in expected}, expected, axis=-1)
    assert "am/beta/mean" in (Path(csv.log_dir) / "metrics.csv").read_text().splitlines()[0]


def test_layers_and_the_histogram_are_for_tensorboard_and_leave_out_what_never_stepped(tmp_path: Path) -> None:
    params = [(f"layers.{i}.weight", torch.nn.Parameter(torch.ones(3))) for i in range(2)]
    optimizer = AMAdamW(params)
    params[0][1].grad = torch.ones(3)
    board, csv = TensorBoardLogger(tmp_path / "board"), CSVLogger(tmp_path / "csv")
    curves = StatsLogger(optimizer, "am", per_layer=True, histogram=True)
    optimizer.step()
    curves.read(1)
    curves.log([board, csv], 3, "one device")
    csv.save()
    board.experiment.flush()
    found = events(board)
    assert [tag for tag in found.Tags()["scalars"] if "/layer/" in tag] == [
        "am/beta/layer/layers.0",
        "am/beta/layer/layers.0/min",
    ]
    assert [event.histogram_value.num for event in found.Histograms("am/beta")] == [1.0]
    columns = (Path(csv.log_dir) / "metrics.csv").read_text().splitlines()[0]
    assert "am/beta/mean" in columns and "/layer/" not in columns


def test_accumulation_logs_steps_only(tmp_path: Path) -> None:
    board = TensorBoardLogger(tmp_path)
    callback = AdaptiveMemory(log_every_n_steps=1, per_layer=False, histogram=False)
    trainer = fit(Regression(batches=24), callback, logger=board, accumulate_grad_batches=3)
    assert trainer.global_step == 12
    found = events(board)
    assert len(found.Scalars("am/beta/mean")) == 12
    assert not found.Tags()["histograms"]
    assert not any("layer/" in tag for tag in found.Tags()["scalars"])


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "64-true"])
def test_precisions_and_clipping_run(precision: str) -> None:
    module = Regression()
    trainer = fit(module, precision=precision, gradient_clip_val=0.5)
    assert math.isfinite(module.losses[-1])
    state = trainer.optimizers[0].state[next(module.parameters())]
    assert state["beta_prod"].dtype == (torch.float64 if precision == "64-true" else torch.float32)


class Manual(Regression):
    """Step two optimizers by hand; the second is an AdamW that has the other parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self):
        first, last = list(self.net[:3].parameters()), list(self.net[3:].parameters())
        return [torch.optim.AdamW(first, lr=0.05), torch.optim.AdamW(last, lr=0.02)]

    def training_step(self, batch, batch_idx) -> None:
        x, y = batch_of(batch_idx)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(torch.nn.functional.mse_loss(self.net(x), y))
        for optimizer in self.optimizers():
            optimizer.step()
        assert set(self.optimizers()[0].momentum()) == {
            f"net.{i}.{kind}" for i in (0, 1) for kind in ("weight", "bias")
        }


def test_manual_optimization_with_two_optimizers(tmp_path: Path) -> None:
    board = TensorBoardLogger(tmp_path)
    trainer = pl.Trainer(**quiet(max_steps=12, log_every_n_steps=2, callbacks=[AdaptiveMemory()], logger=board))
    trainer.fit(Manual())
    assert [type(optimizer) for optimizer in trainer.optimizers] == [AMAdamW, AMAdamW]
    scalars = events(board).Tags()["scalars"]
    assert "am/beta/mean" in scalars and "am-1/beta/mean" in scalars


class Poisoned(Regression):
    """Make the gradient of one layer NaN at the given steps."""

    def __init__(self, bad: set[int]) -> None:
        super().__init__()
        self.bad = bad

    def on_before_optimizer_step(self, optimizer) -> None:
        if len(self.losses) - 1 in self.bad:
            self.net[3].weight.grad.fill_(float("nan"))


def test_skipped_steps_are_counted_and_warned_about(tmp_path: Path) -> None:
    board = TensorBoardLogger(tmp_path)
    with pytest.warns(UserWarning, match=r"2 steps since the last report dropped.*net\.3\.weight") as told:
        fit(Poisoned({4, 5}), logger=board)
    assert sum("since the last report dropped" in str(warning.message) for warning in told) == 1
    assert [event.value for event in events(board).Scalars("am/skipped_steps")] == [0, 0, 2, 2, 2, 2]


def test_too_many_skips_in_a_row_end_the_run_after_a_checkpoint(tmp_path: Path) -> None:
    module = Poisoned(set(range(3, 12)))
    with pytest.raises(RuntimeError, match=r"5 steps in a row .*'net\.3\.weight'") as error:
        fit(module, AdaptiveMemory(max_consecutive_skips=5, log_every_n_steps=100), default_root_dir=tmp_path)
    (checkpoint,) = tmp_path.glob("am-nonfinite-step=*.ckpt")
    assert str(checkpoint) in str(error.value)
    saved = torch.load(checkpoint, weights_only=False)
    assert all(value.isfinite().all() for value in saved["state_dict"].values())
    assert saved["callbacks"]["AdaptiveMemory"]["skipped_steps"][0] >= 5


def test_resume_is_bitwise_the_unbroken_run(tmp_path: Path) -> None:
    whole = Regression()
    fit(whole)
    half = Regression()
    trainer = pl.Trainer(**quiet(max_steps=5, callbacks=[AdaptiveMemory()]))
    trainer.fit(half)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    rest = Regression()
    trainer = pl.Trainer(**quiet(max_steps=12, callbacks=[AdaptiveMemory()]))
    trainer.fit(rest, ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert rest.seen == whole.seen[5:]
    assert all(torch.equal(a, b) for a, b in zip(rest.parameters(), whole.parameters(), strict=True))
