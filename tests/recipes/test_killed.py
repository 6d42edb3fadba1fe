"""A run that is killed with -9 and restarted with --ckpt_path last ends with the bits of the unbroken one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.python import PYTHON

from .commands import PRETRAIN, arguments, differences, load, run, training_state
from .pages import read_curves

KILLED = Path(__file__).with_name("killed.py")
STEPS, EVERY = 40, 10

pytestmark = pytest.mark.slow


def command(root: Path, source: Path, *extra: str) -> list[str]:
    return arguments(root, source, STEPS, "--checkpoint.every_n_train_steps", str(EVERY), "--ckpt_path", "last", *extra)


def start(program: list[str], cwd: Path) -> subprocess.Popen[bytes]:
    """Start a program in its own process group, so that a kill includes the ranks that Lightning starts."""
    return subprocess.Popen(
        [PYTHON, *program],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def kill_when(process: subprocess.Popen[bytes], ready: Callable[[], bool]) -> None:
    """SIGKILL the whole group as soon as `ready` returns True."""
    deadline = time.monotonic() + 120
    while not ready():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline, "the run did not come so far"
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, corpus_folder: Path) -> Path:
    root = tmp_path_factory.mktemp("unbroken") / "run"
    result = run(command(root, corpus_folder), root.parent)
    assert result.returncode == 0, result.stderr
    return root


def test_kills_at_the_worst_moments_leave_no_trace(tmp_path: Path, corpus_folder: Path, unbroken: Path) -> None:
    """One run is killed repeatedly; after every kill last.ckpt is complete, or absent."""
    root = tmp_path / "run"
    last = root / "checkpoints" / "last.ckpt"
    moments = [
        # call, file, which one; then the step that last.ckpt must be at
        ("fsync", "index.json", "1", None),  # all shards are there, the index is not renamed
        ("fsync", "step-", "1", None),  # the first checkpoint is written, not renamed
        ("replace", "manifest", "1", None),  # it is renamed, and has no manifest yet
        ("replace", "step-000020", "1", 10),  # resumed from it; the second is flushed, not renamed
        ("link", "step-000020", "1", 10),  # the second has its manifest, last.ckpt is still the first
        ("fsync", "step-000030", "1", 20),  # resumed from it, in the middle of the third write
        ("unlink", ".last.ckpt", "2", 30),  # last.ckpt has just been replaced
        ("replace", ".last.ckpt", "1", 30),  # the last checkpoint is there, last.ckpt is still the third
    ]
    for call, part, number, step in moments:
        args = [str(KILLED), call, part, number, *command(root, corpus_folder)]
        process = start(args, tmp_path)
        assert process.wait(120) == -signal.SIGKILL, (call, part, number)
        assert (load(last)["global_step"] if last.exists() else None) == step, (call, part, number)
    result = run(command(root, corpus_folder), tmp_path)
    assert result.returncode == 0, result.stderr
    assert differences(training_state(last), training_state(unbroken / "checkpoints" / "last.ckpt")) == []
    assert sorted(p.name for p in (root / "checkpoints").iterdir()) == sorted(
        p.name for p in (unbroken / "checkpoints").iterdir()
    )  # no leftover of a killed write
    ours, theirs = (read_curves(folder / "logs")["train/loss"] for folder in (root, unbroken))
    assert theirs.steps.tolist() == list(range(1, STEPS + 1))
    # Lightning logs a step after its checkpoint, so the points of the kills' own steps may be lost, but no others.
    assert set(theirs.steps) - set(ours.steps) <= {10, 20, 30, 40}
    assert np.isin(ours.values, theirs.values).all()


def test_the_curves_reach_as_far_as_the_checkpoint(tmp_path: Path, corpus_folder: Path) -> None:
    """The logger keeps its points in memory, and the kill comes just after the first checkpoint."""
    options = {"save_dir": str(tmp_path), "name": "logs", "version": ""}
    logger = {
        "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
        "init_args": options,
        "dict_kwargs": {"flush_secs": 1000, "max_queue": 10_000},
    }
    args = command(tmp_path / "run", corpus_folder, "--trainer.logger", json.dumps(logger))
    process = start([str(KILLED), "unlink", ".last.ckpt", "2", *args], tmp_path)
    assert process.wait(120) == -signal.SIGKILL
    assert load(tmp_path / "run" / "checkpoints" / "last.ckpt")["global_step"] == EVERY
    assert read_curves(tmp_path / "logs")["train/loss"].steps.tolist() == list(range(1, EVERY))


def test_a_kill_between_two_checkpoints_leaves_no_trace(tmp_path: Path, corpus_folder: Path, unbroken: Path) -> None:
    root = tmp_path / "run"
    second = root / "checkpoints" / "step-000020.ckpt"
    process = start([str(PRETRAIN), *command(root, corpus_folder)], tmp_path)
    kill_when(process, second.exists)
    assert load(root / "checkpoints" / "last.ckpt")["global_step"] in (10, 20, 30)
    assert run(command(root, corpus_folder), tmp_path).returncode == 0
    ours, theirs = (training_state(folder / "checkpoints" / "last.ckpt") for folder in (root, unbroken))
    assert differences(ours, theirs) == []


def finish(args: list[str], cwd: Path) -> None:
    """Run to the end. gloo sometimes aborts a process at exit; the same command then resumes the run."""
    result = run(args, cwd)
    if result.returncode:
        result = run(args, cwd)
    assert result.returncode == 0, result.stderr


def test_two_processes_resume_to_the_same_bits(tmp_path: Path, corpus_folder: Path, unbroken: Path) -> None:
    """A resumed run under DDP equals an unbroken one bitwise, and one process with the whole batch up to rounding."""
    ddp = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    whole, root = tmp_path / "whole", tmp_path / "run"
    finish(command(whole, corpus_folder, *ddp), tmp_path)
    process = start([str(PRETRAIN), *command(root, corpus_folder, *ddp)], tmp_path)
    kill_when(process, (root / "checkpoints" / "last.ckpt").exists)
    finish(command(root, corpus_folder, *ddp), tmp_path)
    states = [training_state(folder / "checkpoints" / "last.ckpt") for folder in (root, whole, unbroken)]
    assert differences(states[0], states[1]) == []
    for name, weight in states[2]["state_dict"].items():
        assert (states[0]["state_dict"][name] - weight).abs().max() < 1e-4, name
