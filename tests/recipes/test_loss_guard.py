"""Losses and gradients that are not finite, and jumps of the loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from am_lightning.pretrain.callbacks.loss_guard import LossGuard
from am_lightning.pretrain.runtime.errors import RecipeError

from .commands import load
from .small_run import Options, run


def weights(root: Path, step: int) -> dict[str, torch.Tensor]:
    return load(root / "checkpoints" / f"step-{step:06d}.ckpt")["state_dict"]


@pytest.mark.parametrize("plain", [False, True])
def test_a_bad_step_changes_nothing(tmp_path: Path, plain: bool, recwarn: pytest.WarningsRecorder) -> None:
    """AMAdamW by itself, AdamW through the guard; the steps before and after count."""
    options = Options(str(tmp_path), every=1, steps=6, plain_adamw=plain, events={"3": "nan"})
    options.guard = {"check_every_n_steps": 2}
    assert run(options) == "finished"
    before, bad, after = (weights(tmp_path, step) for step in (3, 4, 5))
    for name, weight in before.items():
        assert torch.equal(weight, bad[name]), name
        assert not torch.equal(weight, after[name]), name
        assert after[name].isfinite().all()
    state = load(tmp_path / "checkpoints" / "step-000004.ckpt")["optimizer_states"][0]["state"]
    assert {int(s["step"]) for s in state.values()} == {3}
    assert any("step 4 was dropped: its loss (nan)" in str(w.message) for w in recwarn)


@pytest.mark.filterwarnings("ignore:step 5 was dropped")
def test_too_many_bad_steps_end_the_run_and_name_the_checkpoint_before_them(tmp_path: Path) -> None:
    bad = {str(batch): "nan" for batch in range(4, 40)}
    options = Options(str(tmp_path), steps=40, every=2, events=bad)
    options.guard = {"max_bad_steps": 5, "check_every_n_steps": 3}
    ended = run(options)
    assert ended.startswith("error: 5 steps in a row, up to step 9, had a loss (nan)"), ended
    assert f"--ckpt_path {tmp_path / 'checkpoints' / 'step-000004.ckpt'}" in ended
    assert "lower the learning rate" in ended


@pytest.mark.filterwarnings("ignore:step . was dropped")
def test_bad_steps_that_are_not_in_a_row_do_not_end_the_run(tmp_path: Path) -> None:
    options = Options(str(tmp_path), steps=9, events={str(batch): "nan" for batch in (2, 4, 6)})
    options.guard = {"max_bad_steps": 2, "check_every_n_steps": 1}
    assert run(options) == "finished"


@pytest.mark.filterwarnings("ignore:step 5 was dropped")
def test_the_guard_goes_on_counting_after_a_resume(tmp_path: Path) -> None:
    guard = {"max_bad_steps": 3, "check_every_n_steps": 1}
    bad = {str(batch): "nan" for batch in (4, 5, 6)}
    assert run(Options(str(tmp_path), steps=6, events=bad, guard=guard)) == "finished"
    ended = run(Options(str(tmp_path), steps=9, events=bad, guard=guard))
    assert ended.startswith("error: 3 steps in a row, up to step 7,"), ended


def guard_options(root: Path, on_spike: str, high: range) -> Options:
    options = Options(str(root), steps=40, every=10, events={str(batch): "huge" for batch in high})
    options.guard = {"window": 10, "check_every_n_steps": 5, "spike_steps": 3, "on_spike": on_spike}
    return options


@pytest.mark.parametrize(("on_spike", "warned"), [("warn", True), ("stop", True), ("ignore", False)])
def test_one_high_step_is_told_of_and_no_more(
    tmp_path: Path, on_spike: str, warned: bool, recwarn: pytest.WarningsRecorder
) -> None:
    assert run(guard_options(tmp_path, on_spike, range(20, 21))) == "finished"
    assert any("the loss jumped to" in str(w.message) and "at step 21" in str(w.message) for w in recwarn) == warned


@pytest.mark.filterwarnings("ignore:the loss jumped to")
def test_a_loss_that_stays_high_can_end_the_run(tmp_path: Path) -> None:
    ended = run(guard_options(tmp_path, "stop", range(22, 40)))
    assert "at step 25, from" in ended
    assert "stayed there for 3 steps" in ended
    assert f"--ckpt_path {tmp_path / 'checkpoints' / 'step-000020.ckpt'}" in ended
    assert run(guard_options(tmp_path / "w", "warn", range(22, 40))) == "finished"


@pytest.mark.parametrize(
    "argument",
    [{"max_bad_steps": 0}, {"check_every_n_steps": 0}, {"window": 9}, {"sigmas": 0.0}, {"on_spike": "panic"}],
)
def test_a_wrong_argument_is_named(argument: dict[str, Any]) -> None:
    (name, value) = next(iter(argument.items()))
    with pytest.raises(RecipeError, match=rf"loss_guard.{name} is {value!r}; allowed: "):
        LossGuard(**argument)
