"""pretrain_accelerate.py and pretrain_hf_trainer.py resume from a checkpoint as if they had never stopped."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from am_lightning.pretrain.commands.report.events import PATTERN, read_files
from tests.huggingface.events import scalars_in
from tests.python import PYTHON

from .commands import RECIPES, arguments

pytestmark = pytest.mark.slow

# Program -> its name of the checkpoint of a step.
CHECKPOINTS = {"pretrain_accelerate.py": "step-{:06d}", "pretrain_hf_trainer.py": "checkpoint-{}"}


def start(program: str, root: Path, corpus: Path, steps: int, *extra: str) -> subprocess.Popen[str]:
    settings = arguments(root, corpus, steps, "--checkpoint.every_n_train_steps", "3", *extra)
    return subprocess.Popen(
        [PYTHON, str(RECIPES / program), *settings],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(program: str, root: Path, corpus: Path, steps: int, *extra: str, status: int = 0) -> tuple[str, str]:
    process = start(program, root, corpus, steps, *extra)
    out, errors = process.communicate(timeout=240)
    assert process.returncode == status, f"{out}\n{errors}"
    return out, errors


def losses(root: Path) -> dict[int, float]:
    return scalars_in(root / "logs")["train/loss"]


@pytest.mark.parametrize("program", CHECKPOINTS)
def test_a_new_run_moves_the_earlier_one_away(program: str, tmp_path: Path, corpus_folder: Path) -> None:
    run(program, tmp_path, corpus_folder, 3, "--checkpoint.keep", "1")
    files = {path.relative_to(tmp_path): path.read_bytes() for path in (tmp_path / "checkpoints").rglob("*.*")}
    out, _ = run(program, tmp_path, corpus_folder, 1, "--checkpoint.keep", "1")
    assert f"held a run already: moved to {tmp_path / 'earlier' / '1'}" in out
    assert files == {path: (tmp_path / "earlier" / "1" / path).read_bytes() for path in files}
    assert [*losses(tmp_path)] == [1] and [*losses(tmp_path / "earlier" / "1")] == [1, 2, 3]
    before = {path: path.read_bytes() for path in (tmp_path / "checkpoints").rglob("*.*")}
    earlier = tmp_path / "earlier" / "1" / "checkpoints" / CHECKPOINTS[program].format(3)
    _, errors = run(program, tmp_path, corpus_folder, 4, "--ckpt_path", str(earlier), status=1)
    assert f"is not in {tmp_path / 'checkpoints'}, which holds the checkpoints of another run" in errors
    assert {path: path.read_bytes() for path in (tmp_path / "checkpoints").rglob("*.*")} == before
    other = next(name for name in CHECKPOINTS if name != program)
    _, errors = run(other, tmp_path, corpus_folder, 2, "--ckpt_path", "last", status=1)
    assert f"are {program}'s. Resume with that program" in errors and "Traceback" not in errors


@pytest.mark.parametrize("program", CHECKPOINTS)
def test_a_resumed_run_is_the_unbroken_one(program: str, tmp_path: Path, corpus_folder: Path) -> None:
    """The rows, weights, momentum and schedule are the same: the losses of the later steps are equal to the bit."""
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    run(program, whole, corpus_folder, 6)
    middle = whole / "checkpoints" / CHECKPOINTS[program].format(3)
    out, _ = run(program, resumed, corpus_folder, 6, "--ckpt_path", str(middle))
    assert "validation loss" in out
    assert losses(resumed) == {step: loss for step, loss in losses(whole).items() if step > 3}
    before = (resumed / "logs" / "config.yaml").read_bytes()
    _, errors = run(program, resumed, corpus_folder, 6, "--ckpt_path", "last", "--data.batch_size", "16", status=1)
    assert "data.batch_size is 16, the checkpoint was trained with 8" in errors
    _, errors = run(program, resumed, corpus_folder, 6, "--ckpt_path", "last", "--model.hidden_size", "96", status=1)
    assert "error: model.hidden_size is 96, the checkpoint's model has " in errors and "Traceback" not in errors
    sgd = ["--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", "0.1", "--trainer.callbacks", "null"]
    _, errors = run(program, resumed, corpus_folder, 9, "--ckpt_path", "last", *sgd, status=1)
    assert "error: model.optimizer is SGD, the checkpoint's is an Adam" in errors and "Traceback" not in errors
    _, errors = run(program, tmp_path / "other", corpus_folder, 6, "--ckpt_path", str(resumed), status=1)
    assert f"error: --ckpt_path {resumed} is not a " in errors and "Traceback" not in errors
    assert (resumed / "logs" / "config.yaml").read_bytes() == before
    newest = resumed / "checkpoints" / CHECKPOINTS[program].format(6)
    for file in newest.glob("r*_state*"):  # random states, whose absence both libraries ignore
        file.write_bytes(file.read_bytes()[:-7])
    _, errors = run(program, resumed, corpus_folder, 7, "--ckpt_path", "last", "--checkpoint.keep", "1", status=1)
    assert f"no checkpoint in {newest.parent} is whole: {newest.name} (" in errors
    shutil.copytree(middle, newest.with_name(middle.name))
    changed = ["--checkpoint.keep", "1", "--model.optimizer.lr", "1e-4", "--trainer.log_every_n_steps", "4"]
    out, errors = run(program, resumed, corpus_folder, 8, "--ckpt_path", "last", *changed)
    assert f"the checkpoint {newest} is broken (" in out + errors
    assert "trainer_state.json" not in errors  # no warning of the Trainer that it has the checkpoint's intervals
    assert [path.name for path in newest.parent.iterdir()] == [CHECKPOINTS[program].format(8)]
    rates = read_files((resumed / "logs").rglob(PATTERN), first_step=1)["lr"]
    assert rates.steps.tolist() == [4, 8] and rates.last < 1e-4  # not the interval and the rate of the checkpoint


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("program", CHECKPOINTS)
def test_a_signal_saves_the_step(program: str, number: signal.Signals, tmp_path: Path, corpus_folder: Path) -> None:
    """The signal may come twice: from the terminal, and from a launcher that passes it on."""
    process = start(program, tmp_path, corpus_folder, 100_000)
    deadline = time.monotonic() + 200
    while not (tmp_path / "checkpoints" / CHECKPOINTS[program].format(3)).exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
        time.sleep(0.1)
    process.send_signal(number)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + number
    step = int(errors.partition(f"stopped by {number.name} after step ")[2].split()[0].rstrip(","))
    assert (tmp_path / "checkpoints" / CHECKPOINTS[program].format(step)).is_dir()
