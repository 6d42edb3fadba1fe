"""DeepSpeed's own checkpoints at the same number of ranks, and universal ones at any number."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.python import PYTHON

pytestmark = pytest.mark.slow

SAVE, RESUME = "tests.deepspeed.checkpoints:save", "tests.deepspeed.checkpoints:resume"
START_UP = 300
OPTIONS = {"am_table", "am_options"}  # in files only: in a live group they would become stale


def check(ranks: list[dict]) -> None:
    assert max(rank["beta"] for rank in ranks) <= 5e-6
    assert max(rank["weights"] for rank in ranks) <= 1e-5
    assert all(rank["bits"] == ranks[0]["bits"] for rank in ranks)
    assert all(rank["decays"] == [0.1, 0.0] for rank in ranks)
    assert not OPTIONS & set(ranks[0]["keys"])


def to_universal(folder: Path) -> None:
    command = [PYTHON, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--input_folder", str(folder / "half"), "--output_folder", str(folder / "universal")]
    env = {**os.environ, "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("scope", ["tensor", "global"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_resumed_at_the_same_number_of_ranks(pool, tmp_path: Path, stage: int, scope: str) -> None:
    pool(2).run(SAVE, timeout=START_UP, folder=str(tmp_path), stage=stage, scope=scope)
    check(pool(2).run(RESUME, timeout=START_UP, folder=str(tmp_path), stage=stage, scope=scope))


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["tensor", "global"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_universal_to_fewer_and_more_ranks(pool, tmp_path: Path, stage: int, scope: str) -> None:
    pool(2).run(SAVE, timeout=START_UP, folder=str(tmp_path), stage=stage, scope=scope)
    to_universal(tmp_path)
    for world in (1, 2, 4):
        check(pool(world).run(RESUME, timeout=START_UP, folder=str(tmp_path), stage=stage, scope=scope, universal=True))


@pytest.mark.parametrize("stage", [2, 3])
def test_universal_to_one_rank(pool, tmp_path: Path, stage: int) -> None:
    pool(2).run(SAVE, timeout=START_UP, folder=str(tmp_path), stage=stage)
    to_universal(tmp_path)
    check(pool(1).run(RESUME, timeout=START_UP, folder=str(tmp_path), stage=stage, universal=True))


@pytest.mark.parametrize("stage", [1, 3])
def test_a_checkpoint_of_adamw_is_taken_over_with_a_warning(pool, tmp_path: Path, stage: int) -> None:
    folder = str(tmp_path)
    ranks = pool(2).run("tests.deepspeed.checkpoints:take_over", timeout=START_UP, folder=folder, stage=stage)
    for rank in ranks:
        assert any("no adaptive scalars" in text for text in rank["warnings"])
        assert rank["beta"] <= 5e-6
        assert rank["weights"] <= 1e-5
