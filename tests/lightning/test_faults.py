"""Several ranks: a run that must end, a LearningRateFinder, and Lightning's own launcher."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.lightning.processes import run_module
from tests.lightning.test_fabric import events
from tests.lightning.test_strategies import check
from tests.python import COLD
from tests.sharding.pool import Pool

HERE = "tests.lightning.cluster_faults:"
Ranks = Callable[[int], Pool]


@pytest.mark.parametrize("placed", ["ddp", "fsdp1", "fsdp2"])
def test_too_many_skips_end_the_run_on_every_rank_with_one_checkpoint(pool: Ranks, placed: str, tmp_path: Path) -> None:
    """Only one rank's loss is NaN."""
    for rank in pool(2).run(f"{HERE}give_up", placed=placed, folder=str(tmp_path)):
        assert "3 steps in a row were dropped" in rank["text"] and "'net." in rank["text"]
        assert rank["checkpoints"] == ["am-nonfinite-step=5.ckpt"]
        assert rank["finite"] and rank["steps"] == 5


@pytest.mark.parametrize("placed", ["ddp", "fsdp2"])
def test_steps_before_on_fit_start_know_the_layout_too(pool: Ranks, placed: str) -> None:
    """A LearningRateFinder makes them. (Under FSDP1 Lightning cannot restore a save from before the first step.)"""
    for rank in pool(2).run(f"{HERE}after_a_learning_rate_finder", placed=placed):
        assert rank["known"] and rank["names"]
        assert rank["raw"] <= 1e-12 and rank["weights"] <= 1e-12 and rank["share"] > 0.2


@pytest.mark.parametrize("placed", ["ddp", "fsdp2"])
def test_an_optimizer_that_has_made_no_step_is_not_described(pool: Ranks, placed: str, tmp_path: Path) -> None:
    ranks = pool(2).run(f"{HERE}second_optimizer_is_late", placed=placed, folder=str(tmp_path), timeout=40)
    for seen in ranks:
        assert [step["1"] for step in seen] == [False] * 3 + [True] * 3
    tags = events(tmp_path / "run").Tags()["tensors"]
    assert {"am/summary/text_summary", "am-1/summary/text_summary", "custom_scalars__config__"} == set(tags)


@pytest.mark.slow
def test_lightnings_own_launcher(tmp_path: Path) -> None:
    results = [tmp_path / f"rank{rank}.pt" for rank in range(2)]
    ranks = run_module("tests.lightning.launched", tmp_path, results, threads=1, python=COLD)
    for placed in ("fsdp1", "fsdp2", "ddp"):
        check([rank[placed] for rank in ranks])
