"""Accelerate's checkpoint folders."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.sharding.pool import pools


@pytest.mark.slow
def test_a_step_saved_again_replaces_the_first_and_clears_what_a_kill_left(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    for name in (".step-000004.part", ".step-000005.replaced"):
        (folder / name).mkdir(parents=True)
        (folder / name / "half").touch()
    with pools() as start:
        ends = start(2).run("tests.recipes.accelerate_checkpoints:save_one_step_twice", timeout=60, folder=str(folder))
    assert ends == [(["step-000005"], True)] * 2
