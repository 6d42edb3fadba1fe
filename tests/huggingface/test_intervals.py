"""Accelerate's trackers get the mean and the ends of the interval, of a beta_t that is known at every step."""

from __future__ import annotations

from pathlib import Path

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

from am_lightning import AMAdamW
from am_lightning.huggingface import attach
from tests.huggingface.events import scalars_in
from tests.loggers.intervals import assert_curves, curves_of
from tests.loggers.planted import CAP, Planted, expected_curves, planted

STEPS = 50


def run(
    folder: Path, first: int, last: int, *, every: int, accumulate: int = 1, saved: bool = True, load: bool = False
) -> None:
    """Steps after ``first`` up to ``last``, then a checkpoint in the folder above, which ``load`` begins with."""
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


@pytest.mark.parametrize("saved", [True, False])
def test_a_resume_leaves_no_gap_where_the_reader_is_saved(tmp_path: Path, saved: bool) -> None:
    run(tmp_path / "first", 0, 30, every=7, saved=saved)
    run(tmp_path / "rest", 30, STEPS, every=7, saved=saved, load=True)
    begins = 28 if saved else 30
    assert_curves(scalars_in(tmp_path / "rest"), curves_of(planted(STEPS), (35, 42, 49), begins=begins, cap=CAP))
