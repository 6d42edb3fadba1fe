"""Accelerate's trackers and the Trainer log the mean and the extremes over the interval of a known beta_t."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import nn
from transformers import Trainer

from am_lightning import AMAdamW
from am_lightning.huggingface import AdaptiveMemoryCallback, attach
from tests.huggingface.events import pages_in, scalars_in
from tests.huggingface.trainer_runs import make_trainer
from tests.loggers.intervals import assert_curves, curves_of
from tests.loggers.planted import CAP, Planted, curves_of_two, expected_curves, planted, split_in_two
from tests.python import PYTHON

STEPS = 50


def run(
    folder: Path, first: int, last: int, *, every: int, accumulate: int = 1, saved: bool = True, load: bool = False
) -> None:
    """Make the steps after ``first`` up to ``last``, beginning with the checkpoint ``load``, and save one."""
    AcceleratorState._reset_state()
    GradientState._reset_state()
    accelerator = Accelerator(
        cpu=True, log_with="tensorboard", project_dir=folder, gradient_accumulation_steps=accumulate
    )
    accelerator.init_trackers("run")
    net = Planted()
    own = AMAdamW(net.named_parameters(), lr=0.01, weight_decay=0.0)
    model, optimizer = accelerator.prepare(net, own)
    reader = attach(accelerator, optimizer, log_every_n_steps=every)
    if saved:
        accelerator.register_for_checkpointing(reader)
    if load:
        accelerator.load_state(str(folder.parent / "half"))
    for _ in range((last - first) * accumulate):
        with accelerator.accumulate(model):
            accelerator.backward(net.loss(own))
            optimizer.step()
            optimizer.zero_grad()
    accelerator.save_state(str(folder.parent / "half"))
    accelerator.end_training()


@pytest.mark.parametrize(("every", "accumulate"), [(1, 1), (7, 1), (50, 1), (7, 3)])
def test_trackers_get_the_interval(tmp_path: Path, every: int, accumulate: int) -> None:
    run(tmp_path / "whole", 0, STEPS, every=every, accumulate=accumulate)
    assert_curves(scalars_in(tmp_path / "whole"), expected_curves(STEPS, every, layers=False))
    check_page(tmp_path / "whole", "")


def check_page(folder: Path, before: str) -> None:
    """Require that Custom Scalars has the momentum once, from 0 to the cap, with each of its curves present."""
    (page,) = pages_in(folder)
    charts = page["adaptive momentum (am)"]
    assert charts["beta_t of all tensors"] == [f"{before}am/beta/{what}" for what in ("mean", "floor", "cap")]
    found = scalars_in(folder)
    for tag in (tag for tags in charts.values() for tag in tags):
        assert any(re.fullmatch(tag, one) for one in found), tag
    assert set(found[f"{before}am/beta/floor"]) == set(found[f"{before}am/beta/mean"])


@pytest.mark.parametrize("saved", [True, False])
def test_a_resume_leaves_no_gap_where_the_reader_is_saved(tmp_path: Path, saved: bool) -> None:
    run(tmp_path / "first", 0, 30, every=7, saved=saved)
    run(tmp_path / "rest", 30, STEPS, every=7, saved=saved, load=True)
    begins = 28 if saved else 30
    assert_curves(scalars_in(tmp_path / "rest"), curves_of(planted(STEPS), (35, 42, 49), begins=begins, cap=CAP))


def test_trackers_get_the_intervals_of_two_optimizers(tmp_path: Path) -> None:
    """Each optimizer has its own interval, counted in its own steps."""
    AcceleratorState._reset_state()
    GradientState._reset_state()
    accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=tmp_path)
    accelerator.init_trackers("run")
    net = Planted()
    own = split_in_two(net)
    _, *optimizers = accelerator.prepare(net, *own)
    for optimizer, every in zip(optimizers, (7, 10), strict=True):
        attach(accelerator, optimizer, log_every_n_steps=every)
    for _ in range(STEPS):
        accelerator.backward(net.loss(*own))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    accelerator.end_training()
    assert_curves(scalars_in(tmp_path), curves_of_two(STEPS, (7, 10)))


# ---------------------------------------------------------------------- the Trainer
class ForTrainer(nn.Module):
    """A model with the Trainer's interface; ``adaptive`` is its optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Planted()

    def forward(self, input_ids: Any = None, labels: Any = None) -> dict[str, torch.Tensor]:
        return {"loss": self.net.loss(self.adaptive)}


def train(
    folder: Path,
    steps: int,
    *,
    every: int = 7,
    accumulate: int = 1,
    resume: Path | None = None,
    save: int = 10,
    **options: Any,
) -> Trainer:
    model = ForTrainer()
    model.adaptive = AMAdamW(model.named_parameters(), lr=0.01, weight_decay=0.0)
    arguments = {
        "max_steps": steps,
        "logging_steps": every,
        "save_steps": save,
        "gradient_accumulation_steps": accumulate,
        "max_grad_norm": 0.0,
        "learning_rate": 0.01,
        "weight_decay": 0.0,
        "adam_beta2": 0.999,
        **options.pop("arguments", {}),
    }
    trainer = make_trainer(
        folder,
        batch=1,
        model=model,
        callbacks=[AdaptiveMemoryCallback()],
        optimizers=(model.adaptive, torch.optim.lr_scheduler.LambdaLR(model.adaptive, lambda step: 1.0)),
        arguments=arguments,
    )
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


def check(folder: Path, expected: dict[str, dict[int, float]]) -> None:
    assert_curves(scalars_in(folder / "runs"), {f"train/{tag}": points for tag, points in expected.items()})


@pytest.mark.parametrize(("every", "accumulate"), [(1, 1), (7, 1), (50, 1), (7, 2)])
def test_the_trainer_logs_the_interval(tmp_path: Path, every: int, accumulate: int) -> None:
    train(tmp_path, STEPS, every=every, accumulate=accumulate, save=1000)
    check(tmp_path, expected_curves(STEPS, every, layers=False))
    check_page(tmp_path / "runs", "train/")


@pytest.mark.parametrize("older", [False, True])
def test_a_resumed_trainer_continues_in_its_interval(tmp_path: Path, older: bool) -> None:
    """A checkpoint of an older version lacks the interval; one saved after its resume has it."""
    train(tmp_path / "first", 10)
    file = tmp_path / "first" / "checkpoint-10" / "trainer_state.json"
    if older:
        saved = json.loads(file.read_text())
        del saved["stateful_callbacks"]["AdaptiveMemoryCallback"]
        file.write_text(json.dumps(saved))
    train(tmp_path / "rest", 30, resume=file.parent)
    check(tmp_path / "rest", curves_of(planted(30), (14, 21, 28), begins=10 if older else 7, cap=CAP))
    again = tmp_path / "rest" / "checkpoint-20"
    train(tmp_path / "again", 30, resume=again)
    check(tmp_path / "again", curves_of(planted(30), (21, 28), begins=14, cap=CAP))


@pytest.mark.parametrize("bar", [True, False])
def test_the_end_of_a_run_in_one_line(tmp_path: Path, bar: bool) -> None:
    """The line is logged once at the user's own verbosity, beside the Trainer's train_runtime."""
    code = (
        "from pathlib import Path\nfrom tests.huggingface.test_intervals import train\n"
        f"train(Path({str(tmp_path)!r}), 10, save=1000, arguments={{'disable_tqdm': {not bar}}})"
    )
    done = subprocess.run([PYTHON, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    lines = done.stdout.splitlines()
    betas = [beta for step in planted(10) for beta in step.values()]
    (line,) = [line for line in lines if "AdaptiveMemory" in line]
    assert line.startswith(f"AdaptiveMemory, am: mean beta_t {sum(betas) / len(betas):.3f}")
    assert "AdaptiveMemory" not in done.stderr and any("train_runtime" in line for line in lines)


def test_a_second_train_is_a_run_of_its_own(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The optimizer is the same, but its intervals, line and picture start again."""
    trainer = train(tmp_path, 10, save=1000)
    trainer.train()
    told = [line for line in capfd.readouterr().out.splitlines() if line.startswith("AdaptiveMemory, am: ")]
    logged = {r["step"]: r["am/beta/mean"] for r in trainer.state.log_history if "am/beta/mean" in r}
    seen = planted(20)[10:]
    assert logged == pytest.approx(curves_of(seen, (7,), cap=CAP)["am/beta/mean"])
    for line, steps in zip(told, (planted(10), seen), strict=True):
        betas = [beta for step in steps for beta in step.values()]
        assert f"mean beta_t {sum(betas) / len(betas):.3f}" in line
