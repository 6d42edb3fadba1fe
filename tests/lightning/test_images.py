"""A picture in each of Lightning's loggers, read back from its files. TensorBoard is tested only if installed."""

from __future__ import annotations

import sys
from pathlib import Path

import lightning.fabric.loggers.tensorboard
import pytest
from lightning.pytorch import Trainer, loggers
from lightning.pytorch.loggers.logger import DummyLogger

from am_lightning import AdaptiveMemory
from am_lightning.loggers import images
from am_lightning.loggers.images import log_image
from tests.clients import client
from tests.huggingface.events import pages_in
from tests.lightning.model import Regression, quiet
from tests.loggers.pictures import IMAGE, in_comet, in_events, in_mlflow, in_swanlab, in_wandb, same, wandb_rows

TAG, STEP = "am/beta/layers", 30


@pytest.fixture(autouse=True)
def nothing_warned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "_warned", set())


@pytest.mark.parametrize("kind", [loggers.TensorBoardLogger, lightning.fabric.loggers.TensorBoardLogger])
def test_tensorboard(kind: type, tmp_path: Path) -> None:
    logger = kind(tmp_path)
    assert log_image(logger, TAG, IMAGE, STEP)
    logger.finalize("success")
    assert same(in_events(tmp_path), TAG, STEP)


def test_tensorboardx_where_there_is_no_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning then uses tensorboardX: a run has its layout and its picture."""
    writer = client("tensorboardX").SummaryWriter
    monkeypatch.setattr(lightning.fabric.loggers.tensorboard, "_TENSORBOARD_AVAILABLE", False)
    logger = loggers.TensorBoardLogger(tmp_path)
    with monkeypatch.context() as hidden:
        for name in ("tensorboard.plugins.custom_scalar.layout_pb2", "torch.utils.tensorboard.summary"):
            hidden.setitem(sys.modules, name, None)
        trainer = Trainer(**quiet(max_steps=4, logger=logger, callbacks=[AdaptiveMemory(log_every_n_steps=2)]))
        trainer.fit(Regression())
        assert isinstance(logger.experiment, writer)
    assert "adaptive momentum (am)" in pages_in(tmp_path)[-1]
    assert [step for tag, step, _ in in_events(tmp_path) if tag == TAG][-1] == 4


def test_loggers_without_pictures(tmp_path: Path) -> None:
    for logger in (loggers.CSVLogger(tmp_path), lightning.fabric.loggers.CSVLogger(tmp_path), DummyLogger(), object()):
        assert log_image(logger, TAG, IMAGE, STEP) is False


def test_a_failure_is_warned_of_once(tmp_path: Path) -> None:
    logger = loggers.TensorBoardLogger(tmp_path)
    with pytest.warns(UserWarning, match="TensorBoardLogger did not take the picture am/beta/layers: AssertionError"):
        assert log_image(logger, TAG, IMAGE[0], STEP) is False  # the image is not [H, W, 3]
    assert log_image(logger, TAG, IMAGE[0], STEP) is False
    assert log_image(logger, TAG, IMAGE, STEP)


def test_wandb_keeps_the_scalars_beside_it(tmp_path: Path) -> None:
    wandb = client("wandb")
    logger = loggers.WandbLogger(save_dir=tmp_path, offline=True, prefix="run")
    logger.log_metrics({"a": 1.0}, step=STEP)
    assert log_image(logger, TAG, IMAGE, STEP)
    logger.log_metrics({"a": 2.0}, step=STEP)
    logger.log_metrics({"a": 3.0}, step=STEP + 1)
    wandb.finish()
    assert same(in_wandb(tmp_path, "trainer/global_step"), f"run-{TAG}", STEP)
    logged = [(row["run-a"], row["trainer/global_step"]) for row in wandb_rows(tmp_path) if "run-a" in row]
    assert logged == [(1.0, STEP), (2.0, STEP), (3.0, STEP + 1)]


def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = client("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    logger = loggers.MLFlowLogger(tracking_uri=(tmp_path / "its").as_uri())
    assert logger.run_id
    mlflow.set_tracking_uri((tmp_path / "another").as_uri())
    assert log_image(logger, TAG, IMAGE, STEP)
    assert same(in_mlflow(tmp_path / "its"), TAG, STEP) and in_mlflow(tmp_path / "another") == []


def test_comet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client("comet_ml")
    # With Lightning 2.6, online=False creates a disabled experiment.
    monkeypatch.setenv("COMET_START_ONLINE", "false")
    monkeypatch.setenv("COMET_OFFLINE_DIRECTORY", str(tmp_path))
    monkeypatch.setenv("COMET_DISABLE_AUTO_LOGGING", "1")  # the logger sets it and does not restore it
    logger = loggers.CometLogger()
    assert log_image(logger, TAG, IMAGE, STEP)
    logger.experiment.end()
    assert same(in_comet(tmp_path), TAG, STEP)


def test_a_logger_of_wandbs_interface(tmp_path: Path) -> None:
    swanlab = client("swanlab")
    from swanlab.integration.pytorch_lightning import SwanLabLogger

    logger = SwanLabLogger(project="p", mode="offline", log_dir=str(tmp_path))
    assert log_image(logger, TAG, IMAGE, STEP)
    swanlab.finish()
    assert same(in_swanlab(tmp_path), "", STEP)
