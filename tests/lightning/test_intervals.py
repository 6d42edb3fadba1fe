"""Trainer and Fabric log the mean and the extremes over the interval, checked with a known beta_t of every step."""

from __future__ import annotations

import logging
import math
import signal
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from am_lightning import AdaptiveMemory, AMAdamW
from am_lightning.lightning import attach
from tests.lightning.model import quiet
from tests.loggers.intervals import assert_curves, curves_of
from tests.loggers.planted import (
    CAP,
    DIP,
    NAMES,
    Planted,
    Table,
    curves_of_two,
    expected_curves,
    planted,
    split_in_two,
    table,
)

STEPS = 50


class Module(pl.LightningModule):
    """Train AdamW on the planted gradients; the content of the batches is not used."""

    def __init__(self, batches: int = 4 * STEPS, *, of: Table = table, bad: int | None = None) -> None:
        super().__init__()
        self.net, self.batches, self.bad = Planted(of), batches, bad

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.net.parameters(), lr=0.01, weight_decay=0.0)

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(torch.zeros(self.batches, 1))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.net.loss(*self.trainer.optimizers) * (math.nan if batch_idx == self.bad else 1.0)


class Two(Module):
    """Step two optimizers by hand, one of which has only the head."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        parts = [p for n, p in self.net.named_parameters() if n != NAMES[-1]], self.net.head.parameters()
        return [torch.optim.AdamW(part, lr=0.01, weight_decay=0.0) for part in parts]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(self.net.loss(*self.trainer.optimizers))
        for optimizer in self.optimizers():
            optimizer.step()


def fit(module: Module, folder: Path, every: int, *, steps: int = STEPS, **options: Any) -> pl.Trainer:
    callback = options.pop("callback", None) or AdaptiveMemory(log_every_n_steps=every)
    path = options.pop("ckpt_path", None)
    logger = TensorBoardLogger(folder, name="", version="")
    trainer = pl.Trainer(**quiet(max_steps=steps, callbacks=[callback], logger=logger, **options))
    trainer.fit(module, ckpt_path=path, **({"weights_only": True} if path else {}))
    return trainer


def events(folder: Path) -> EventAccumulator:
    found = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    return found.Reload()


def curves(folder: Path) -> dict[str, dict[int, float]]:
    found = events(folder)
    scalars = {tag: {e.step: e.value for e in found.Scalars(tag)} for tag in found.Tags()["scalars"]}
    return {tag.replace("/net.", "/"): points for tag, points in scalars.items()}


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("every", [1, 7, 50])
def test_the_trainer_logs_the_interval(tmp_path: Path, every: int, accumulate: int) -> None:
    """The Trainer logs mean, lowest, highest, clamps, layer groups and layers."""
    fit(Module(), tmp_path, every, accumulate_grad_batches=accumulate)
    found = curves(tmp_path)
    ends = {step + 1 for step in found["am/beta/mean"]}
    assert len(ends) >= STEPS // every // accumulate
    if accumulate == 1:
        assert ends == set(range(every, STEPS + 1, every))
        assert_curves(found, expected_curves(STEPS, every), axis=-1)
    else:  # the Trainer ends an interval by its count of batches
        assert_curves(found, curves_of(planted(STEPS), sorted(ends), cap=CAP), axis=-1)


def test_two_optimizers_have_curves_of_their_own(tmp_path: Path) -> None:
    fit(Two(), tmp_path, 7, steps=2 * STEPS)  # the Trainer counts the steps of both
    assert_curves(curves(tmp_path), curves_of_two(STEPS, (7, 7)), axis=-1)


def test_two_optimizers_have_as_many_pictures_as_one(tmp_path: Path) -> None:
    """Both optimizers have pictures of the same steps, although ``max_steps`` counts the steps of both."""
    fit(Two(), tmp_path / "two", 1, steps=2 * STEPS)
    fit(Module(), tmp_path / "one", 1)
    wanted = {picture.step for picture in events(tmp_path / "one").Images("am/beta/layers")}
    two = events(tmp_path / "two")
    for tag in ("am/beta/layers", "am-1/beta/layers"):
        assert {picture.step for picture in two.Images(tag)} == wanted and len(wanted) == 20


@pytest.mark.parametrize("stop", [30, 28, 3])
def test_a_resume_leaves_no_gap(tmp_path: Path, stop: int) -> None:
    """The run stops inside an interval, at the end of one, and before the first one ends."""
    first = fit(Module(), tmp_path / "first", 7, steps=stop)
    first.save_checkpoint(tmp_path / "half.ckpt")
    fit(Module(), tmp_path / "rest", 7, ckpt_path=tmp_path / "half.ckpt")
    found = curves(tmp_path / "first") if stop >= 7 else {}
    rest = curves(tmp_path / "rest")
    whole = {tag: found.get(tag, {}) | points for tag, points in rest.items()}
    assert_curves(whole, expected_curves(STEPS, 7), axis=-1)


def test_a_checkpoint_of_an_older_version_resumes(tmp_path: Path) -> None:
    """Such a checkpoint has only the count of skipped steps, so the first point covers the steps since the resume."""
    first = fit(Module(), tmp_path / "first", 7, steps=30)
    first.save_checkpoint(tmp_path / "half.ckpt")
    saved = torch.load(tmp_path / "half.ckpt", weights_only=True)
    saved["callbacks"]["AdaptiveMemory"] = {"skipped_steps": [2]}
    torch.save(saved, tmp_path / "half.ckpt")
    fit(Module(), tmp_path / "rest", 7, ckpt_path=tmp_path / "half.ckpt")
    found = curves(tmp_path / "rest")
    assert_curves(found, curves_of(planted(STEPS), (35, 42, 49), begins=30, cap=CAP), axis=-1)
    assert set(found["am/skipped_steps"].values()) == {2.0}


class Logging(Module):
    """Lightning logs a number of its own on the same axis, and validates."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.log("own", 1.0)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None: ...

    val_dataloader = Module.train_dataloader


# Options of ModelCheckpoint and of the Trainer; each pair writes after 10 steps.
IN_THE_BATCH: tuple[dict[str, Any], dict[str, Any]] = {"every_n_train_steps": 10}, {}
AFTER_VALIDATION = (
    {"save_on_train_epoch_end": False},
    {"check_val_every_n_epoch": None, "val_check_interval": 10, "limit_val_batches": 1},
)
AT_THE_EPOCHS_END = {"save_on_train_epoch_end": True}, {"limit_train_batches": 10}
AT_THE_FITS_END = {"every_n_train_steps": 100}, {}


@pytest.mark.parametrize("every", [5, 7])
@pytest.mark.parametrize("moment", [IN_THE_BATCH, AFTER_VALIDATION, AT_THE_EPOCHS_END, AT_THE_FITS_END])
def test_a_resume_has_the_axis_of_lightning(tmp_path: Path, every: int, moment: Any) -> None:
    """When the checkpoint is written, the Trainer's own count may be one behind. every=5 saves on a log step."""
    saves, options = moment
    for folder, steps in (("first", 10), ("rest", 29)):
        saver = pl.callbacks.ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, **saves)
        board = TensorBoardLogger(tmp_path / folder, name="", version="")
        ours = {"callbacks": [AdaptiveMemory(), saver], "enable_checkpointing": True, "log_every_n_steps": every}
        trainer = pl.Trainer(**quiet(max_steps=steps, logger=board, **ours, **{"limit_val_batches": 0, **options}))
        path = tmp_path / "step=10.ckpt"
        trainer.fit(Logging(), ckpt_path=path if path.exists() else None, weights_only=True)
        if not path.exists():
            trainer.save_checkpoint(path)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    ends = [until for until in range(every, 30, every) if until > 10]
    found = curves(tmp_path / "rest")
    assert [step + 1 for step in found["own"]] == ends
    assert_curves(found, curves_of(planted(29), ends, begins=10 // every * every, cap=CAP), axis=-1)
    saved = torch.load(tmp_path / "end.ckpt", weights_only=True)["callbacks"]["AdaptiveMemory"]
    assert float(saved["readers"][0]["history"]["map"]["steps"].sum()) == ends[-1] * len(NAMES)


def test_dropped_steps_are_in_no_interval(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="1 step since the last report dropped"):
        fit(Module(bad=3), tmp_path, 7, steps=14)
    expected = curves_of(planted(13), (6, 13), cap=CAP)  # one less, because the fourth step was skipped
    assert_curves(curves(tmp_path), expected)


def test_the_end_of_a_fit_in_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The line begins with the optimizer; it names a dip's layer and interval, and includes the last steps."""
    with caplog.at_level(logging.INFO):
        fit(Module(), tmp_path, 7)
    told = [record.getMessage() for record in caplog.records if "AdaptiveMemory" in record.getMessage()]
    betas = [beta for step in planted(STEPS) for beta in step.values()]
    mean, at_cap = sum(betas) / len(betas), sum(beta == CAP for beta in betas) / len(betas)
    assert told[0] == "AdaptiveMemory: AdamW is now AMAdamW (scope tensor, lambda 0.1, cap of beta_t 0.89, 6 tensors)"
    assert f"mean beta_t {mean:.3f}, at the cap in {at_cap:.0%} of the tensors' steps" in told[-1]
    assert DIP[1] == 24 and "layers.1 0.010 in steps 22 to 28" in told[-1] and "no step skipped" in told[-1]


@pytest.mark.parametrize("why", [KeyboardInterrupt, SIGTERMException, ValueError])
def test_a_fit_that_is_ended_from_outside_says_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, why: type[BaseException]
) -> None:
    """The line and the last picture include the steps since the last reading. A failed fit shows its error only."""

    class Ended(Module):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 24:
                raise why

    before = signal.getsignal(signal.SIGINT)
    with caplog.at_level(logging.INFO), pytest.raises((SystemExit, ValueError)):
        fit(Ended(), tmp_path, 7)
    signal.signal(signal.SIGINT, before)  # Lightning ignores the signal after a Ctrl-C
    told = [record.message for record in caplog.records if "mean beta_t" in record.message]
    if why is ValueError:
        assert not told
        return
    betas = [beta for step in planted(25) for beta in step.values()]
    assert f"mean beta_t {sum(betas) / len(betas):.3f}" in told[0] and "layers.1 0.010 in steps 22 to 25" in told[0]
    assert events(tmp_path).Images("am/beta/layers")[-1].step == 25


DIPS = {("layers.0.mlp.weight", 13): 0.12, ("embed.weight", 2): 0.5}


def dipping(name: str, step: int) -> float:
    """Return 0.8, except for a dip in step 2 and one after the last full log interval of ten steps."""
    return CAP if step == 1 else DIPS.get((name, step), 0.8)


@pytest.mark.parametrize(
    ("every", "early", "late"),
    [(1, "step 2", "step 13"), (5, "steps 1 to 5", "steps 11 to 13"), (10, "steps 1 to 10", "steps 11 to 13")],
)
def test_the_line_says_in_which_interval_a_dip_was(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, every: int, early: str, late: str
) -> None:
    with caplog.at_level(logging.INFO):
        fit(Module(of=dipping), tmp_path, every, steps=13)
    betas = [beta for step in planted(13, of=dipping) for beta in step.values()]
    (told,) = [record.message for record in caplog.records if "mean beta_t" in record.message]
    assert f"mean beta_t {sum(betas) / len(betas):.3f}, at the cap in 8% of the tensors' steps" in told
    assert f"lowest: layers.0 0.120 in {late}, embed 0.500 in {early}, layers.1 0.800 in " in told


def test_the_line_of_a_resumed_fit_is_of_the_whole_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.warns(UserWarning, match="1 step since the last report dropped"):
        half = fit(Module(of=dipping, bad=2), tmp_path / "first", 4, steps=15)
    half.save_checkpoint(tmp_path / "half.ckpt")
    caplog.clear()
    with caplog.at_level(logging.INFO):
        fit(Module(of=dipping), tmp_path / "rest", 4, steps=18, ckpt_path=tmp_path / "half.ckpt")
    betas = [beta for step in planted(17, of=dipping) for beta in step.values()]
    (told,) = [record.message for record in caplog.records if "mean beta_t" in record.message]
    assert f"mean beta_t {sum(betas) / len(betas):.3f}" in told and "1 step skipped" in told
    assert "layers.0 0.120 in steps 13 to 16, embed 0.500 in steps 1 to 4" in told  # the count includes a dropped step


class Deep(Module):
    def __init__(self, layers: int) -> None:
        super().__init__(batches=6)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(1, 1) for _ in range(layers))

    def configure_optimizers(self) -> Any:
        return AMAdamW(self.layers.named_parameters(), lr=0.01)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return sum(layer(batch).square().sum() for layer in self.layers) + 0.0


@pytest.mark.parametrize(
    ("layers", "per_layer", "shown"), [(32, True, 32), (33, True, 0), (33, "all", 33), (3, False, 0)]
)
def test_curves_of_layers_where_they_can_be_read(tmp_path: Path, layers: int, per_layer: Any, shown: int) -> None:
    """In TensorBoard the picture shows all layers; other loggers get numbers only."""
    csv = CSVLogger(tmp_path / "csv", name="", version="")
    board = TensorBoardLogger(tmp_path, name="", version="")
    callback = AdaptiveMemory(log_every_n_steps=2, per_layer=per_layer)
    pl.Trainer(**quiet(max_steps=6, callbacks=[callback], logger=[board, csv])).fit(Deep(layers))
    found = events(tmp_path)
    tags = [tag for tag in found.Tags()["scalars"] if "/layer/" in tag]
    assert len(tags) == 2 * shown
    pictures = found.Images("am/beta/layers")
    assert pictures[-1].step == 6 and pictures[-1].width > 600
    assert "am/beta/min" in (tmp_path / "csv" / "metrics.csv").read_text()


def test_a_wrong_per_layer_is_named() -> None:
    with pytest.raises(TypeError, match="Invalid per_layer: 'some'"):
        AdaptiveMemory(per_layer="some")


@pytest.mark.parametrize("saved", [True, False])
def test_fabric_logs_the_interval_and_saves_it(tmp_path: Path, saved: bool) -> None:
    def run(folder: str, first: int, last: int, path: Path | None) -> tuple[Any, dict[str, Any]]:
        fabric = Fabric(accelerator="cpu", devices=1, loggers=TensorBoardLogger(tmp_path / folder, name="", version=""))
        net = Planted()
        own = AMAdamW(net.named_parameters(), lr=0.01, weight_decay=0.0)
        model, optimizer = fabric.setup(net, own)
        state = {"model": model, "optimizer": optimizer, "am": attach(fabric, model, optimizer, log_every_n_steps=7)}
        state = state if saved else {key: value for key, value in state.items() if key != "am"}
        if path is not None:
            fabric.load(path, state)
        for _ in range(first, last):
            optimizer.zero_grad()
            fabric.backward(net.loss(own))
            optimizer.step()
        fabric.loggers[0].experiment.flush()
        return fabric, state

    fabric, state = run("first", 0, 30, None)
    fabric.save(tmp_path / "half.ckpt", state)
    run("rest", 30, STEPS, tmp_path / "half.ckpt")
    assert_curves(curves(tmp_path / "first"), expected_curves(28, 7))
    begins = 28 if saved else 30
    assert_curves(curves(tmp_path / "rest"), curves_of(planted(STEPS), (35, 42, 49), begins=begins, cap=CAP))


def test_fabric_logs_the_intervals_of_two_optimizers(tmp_path: Path) -> None:
    """Each optimizer has its own interval, counted in its own steps."""
    fabric = Fabric(accelerator="cpu", devices=1, loggers=TensorBoardLogger(tmp_path, name="", version=""))
    net = Planted()
    own = split_in_two(net)
    model, *optimizers = fabric.setup(net, *own)
    for optimizer, every in zip(optimizers, (7, 10), strict=True):
        attach(fabric, model, optimizer, log_every_n_steps=every)
    for _ in range(STEPS):
        fabric.backward(net.loss(*own))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    fabric.loggers[0].experiment.flush()
    assert_curves(curves(tmp_path), curves_of_two(STEPS, (7, 10)))
