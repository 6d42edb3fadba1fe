"""A picture in transformers' reporters and Accelerate's trackers. All but TensorBoard are tested only if installed."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from am_lightning.huggingface.images import report_image
from tests.clients import client
from tests.huggingface import images_worker
from tests.huggingface.images_worker import STEP, TAG
from tests.loggers import pictures
from tests.loggers.pictures import IMAGE, Kept, same, wandb_rows
from tests.python import PYTHON

ROOT = Path(__file__).parents[2]
READERS: dict[str, Callable[[Path], Kept]] = {
    "mlflow": pictures.in_mlflow,
    "comet_ml": pictures.in_comet,
    "clearml": pictures.in_clearml,
    "swanlab": pictures.in_swanlab,
}
LOSS = {"clearml": 3}  # the JPEG's mean
CLIENTS = ["wandb", "trackio", *READERS]


def sent(kind: str, name: str, folder: Path) -> list[bool]:
    client(name)
    command = [PYTHON, "-m", "tests.huggingface.images_worker", kind, name, str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "did not take" not in done.stderr
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("returned "))
    returned: list[bool] = json.loads(line.removeprefix("returned "))
    return returned


def kept(name: str, folder: Path, axis: str, monkeypatch: pytest.MonkeyPatch) -> Kept:
    if name == "wandb":
        return pictures.in_wandb(folder, axis)
    if name == "trackio":
        from trackio import sqlite_storage

        monkeypatch.setattr(sqlite_storage, "TRACKIO_DIR", folder)
        return pictures.in_trackio(folder, axis)
    return READERS[name](folder)


def test_tensorboard_of_the_trainer(tmp_path: Path) -> None:
    assert images_worker.trainer("tensorboard", tmp_path) == [False, True]
    assert same(pictures.in_events(tmp_path), f"train/{TAG}", 2)


def test_tensorboard_of_accelerate(tmp_path: Path) -> None:
    assert images_worker.accelerator("tensorboard", tmp_path) == [True]
    assert same(pictures.in_events(tmp_path), TAG, STEP)


def test_a_callback_without_a_run() -> None:
    class Own(TrainerCallback):
        _run, _experiment = "42", None

    assert report_image(Own(), TAG, IMAGE, 1) is False


@pytest.mark.parametrize(
    "name", [name for name in CLIENTS if name != "clearml"]
)  # their callbacks take a minute or more
def test_the_trainers_reporters(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sent("trainer", name, tmp_path) == [False, True]
    found = kept(name, tmp_path, "train/global_step", monkeypatch)
    tag = "" if name == "swanlab" else f"train/{TAG}"
    assert same(found, tag, 2, atol=LOSS.get(name, 0))
    if name == "wandb":
        rows = [row for row in wandb_rows(tmp_path) if "train/loss" in row]
        assert [row["train/global_step"] for row in rows] == [1, 2, 3]


@pytest.mark.parametrize("name", CLIENTS)
def test_accelerates_trackers(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sent("accelerator", name, tmp_path) == [True]
    axis = {"wandb": "_step"}.get(name, "step")
    tag = "" if name == "swanlab" else TAG
    assert same(kept(name, tmp_path, axis, monkeypatch), tag, STEP, atol=LOSS.get(name, 0))
    if name == "wandb":
        assert [(row["_step"], row["a"]) for row in wandb_rows(tmp_path)] == [(STEP, 1.0), (STEP + 1, 2.0)]


def test_neptune(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neptune's service has ended and its offline file has no reader, so only the call is tested."""
    neptune = pytest.importorskip("neptune")
    from transformers.integrations import NeptuneCallback

    monkeypatch.chdir(tmp_path)
    callback: Any = NeptuneCallback(project="a/b")
    assert not report_image(callback, TAG, IMAGE, 1)
    callback._run = neptune.init_run(mode="offline", project="a/b")
    assert report_image(callback, TAG, IMAGE, 1)
    callback._run.stop()
    (written,) = tmp_path.rglob("data-*.log")
    assert '"am", "beta", "layers"' in written.read_text()
