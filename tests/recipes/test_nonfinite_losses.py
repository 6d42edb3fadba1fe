"""Losses and gradients that are not finite: single ones are dropped; many in a row end the run, which can resume."""

from __future__ import annotations

from pathlib import Path

import pretrain
import pytest
import torch

from .commands import arguments, load
from .small_run import Options, run

pytestmark = pytest.mark.filterwarnings("ignore:.*since the last report dropped")


def weights(root: Path, step: int) -> dict[str, torch.Tensor]:
    return load(root / "checkpoints" / f"step-{step:06d}.ckpt")["state_dict"]


def test_a_bad_step_changes_nothing(tmp_path: Path) -> None:
    """The steps before and after it count."""
    assert run(Options(str(tmp_path), every=1, steps=6, events={"3": "nan"})) == "finished"
    before, bad, after = (weights(tmp_path, step) for step in (3, 4, 5))
    for name, weight in before.items():
        assert torch.equal(weight, bad[name]), name
        assert not torch.equal(weight, after[name]), name
        assert after[name].isfinite().all()
    state = load(tmp_path / "checkpoints" / "step-000004.ckpt")["optimizer_states"][0]["state"]
    assert {int(s["step"]) for s in state.values()} == {3}


def test_too_many_bad_steps_end_the_run_which_resumes_from_before_them(tmp_path: Path) -> None:
    """No weight is lost, and without the fault the resumed run ends as an unbroken one."""
    bad = {str(batch): "nan" for batch in range(5, 20)}
    ended = run(Options(str(tmp_path), steps=20, every=5, events=bad, max_skips=4))
    saved = tmp_path / "checkpoints" / "am-nonfinite-step=9.ckpt"
    assert ended.startswith("error: 4 steps in a row were dropped because a sum over gradients was not finite"), ended
    assert str(saved) in ended and ended.endswith("max_consecutive_skips is 4.")
    good = weights(tmp_path, 5)
    assert all(torch.equal(weight, good[name]) for name, weight in load(saved)["state_dict"].items())
    assert (tmp_path / "checkpoints" / "last.ckpt").samefile(tmp_path / "checkpoints" / "step-000005.ckpt")
    assert run(Options(str(tmp_path), steps=20, every=5)) == "finished"
    assert run(Options(str(tmp_path / "whole"), steps=20, every=5)) == "finished"
    whole = weights(tmp_path / "whole", 20)
    assert all(torch.equal(weight, whole[name]) for name, weight in weights(tmp_path, 20).items())


def test_bad_steps_that_are_not_in_a_row_do_not_end_the_run(tmp_path: Path) -> None:
    options = Options(str(tmp_path), steps=9, events={str(batch): "nan" for batch in (2, 4, 6)}, max_skips=2)
    assert run(options) == "finished"


AWAY = ("--model.optimizer.init_args.lr", "1e30")  # the first step makes every later loss nan
ADAMW = ("--model.optimizer", "torch.optim.AdamW", *AWAY)


def test_the_recipe_says_how_many_and_the_error_is_one_line(tmp_path: Path, corpus_folder: Path) -> None:
    with pytest.raises(SystemExit, match=r"^error: 20 steps in a row .* max_consecutive_skips is 20\.$"):
        pretrain.main(arguments(tmp_path, corpus_folder, 40, *AWAY))


def test_a_run_whose_steps_nobody_drops_ends_with_its_first_bad_loss(tmp_path: Path, corpus_folder: Path) -> None:
    with pytest.raises(SystemExit, match=r"^error: train/loss is nan at step 3, .* a checkpoint before step 2, the"):
        pretrain.main(arguments(tmp_path, corpus_folder, 40, *ADAMW, "--trainer.callbacks", "null"))
