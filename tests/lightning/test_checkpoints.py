"""Checkpoints of a Trainer, resumed at another world size, under another strategy, or from a run of plain AdamW."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.python import PYTHON
from tests.sharding.pool import Pool, RankError

HERE = "tests.lightning.cluster_checkpoints:"
Ranks = Callable[[int], Pool]


def worlds(*pairs: tuple[int, int]) -> list[Any]:
    return [
        pytest.param(pair, id=f"{pair[0]}to{pair[1]}", marks=[pytest.mark.slow] if 4 in pair else []) for pair in pairs
    ]


# world sizes of the save and of the resume
PAIRS = worlds((2, 1), (2, 2), (2, 4), (4, 2))
PATHS = ["ddp", "fsdp1", "fsdp1_full", "fsdp2", "fsdp2_full"]


@pytest.fixture(scope="module")
def saved(pool: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Return ``saved(placed, world, adaptive=True)``: the path of the checkpoint of step 4, written once per case."""
    done: dict[Any, str] = {}

    def save(placed: str, world: int, **how: Any) -> str:
        key = (placed, world, *how.items())
        if key not in done:
            where = str(tmp_path_factory.mktemp("checkpoint") / f"{placed}.ckpt")
            pool(world).run(f"{HERE}fit_and_save", placed=placed, where=where, **how)
            done[key] = where
        return done[key]

    return save


def check(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["raw"] <= 1e-12 and rank["weights"] <= 1e-12
        assert rank["bits"] == ranks[0]["bits"] and rank["names"] and rank["kind"] == "AMAdamW"
        assert rank["share"] > 0.2 and rank["steps"] == [8.0]


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("placed", PATHS)
def test_the_next_steps_are_those_of_an_unbroken_run(
    pool: Ranks, saved: Callable[..., str], placed: str, pair: tuple[int, int]
) -> None:
    where = saved(placed, pair[0])
    assert Path(where).is_dir() == (placed in ("fsdp1", "fsdp2"))
    check(pool(pair[1]).run(f"{HERE}resume", placed=placed, where=where))


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("placed", PATHS)
def test_a_run_of_adamw_resumes_with_the_callback(
    pool: Ranks, saved: Callable[..., str], placed: str, pair: tuple[int, int]
) -> None:
    """A distributed checkpoint of ModelParallelStrategy lacks the adaptive scalars, and torch refuses to load it."""
    where = saved(placed, pair[0], adaptive=False)
    check(pool(pair[1]).run(f"{HERE}resume", placed=placed, where=where, switched=True))


MOVES = [
    ("fsdp2", 2, "fsdp2_full", 2),  # this turns a distributed checkpoint into one file
    ("fsdp1_full", 2, "ddp", 1),
    ("fsdp1_full", 2, "fsdp2", 2),
    ("fsdp2_full", 2, "fsdp1", 2),
    ("fsdp2_full", 2, "ddp", 2),
    ("fsdp2", 2, "fsdp2_tp", 4),
    ("fsdp2_tp", 4, "fsdp2", 2),
    ("fsdp2_tp_full", 4, "ddp", 1),
    ("fsdp2_full", 2, "fsdp2_tp", 4),
]


@pytest.mark.parametrize(
    ("source", "world", "target", "target_world"),
    [pytest.param(*move, marks=[pytest.mark.slow] if 4 in move else []) for move in MOVES],
)
def test_one_strategy_resumes_with_anothers_checkpoint(
    pool: Ranks, saved: Callable[..., str], source: str, world: int, target: str, target_world: int
) -> None:
    check(pool(target_world).run(f"{HERE}resume", placed=target, where=saved(source, world)))


@pytest.mark.parametrize("target", ["fsdp1", "fsdp2"])
def test_a_ddp_file_goes_into_fsdp_with_one_group(pool: Ranks, tmp_path: Path, target: str) -> None:
    """Lightning numbers the parameters in the module's order, torch.optim in the order of the groups."""
    where = str(tmp_path / "ddp.ckpt")
    pool(2).run(f"{HERE}fit_and_save", placed="ddp", where=where, optimizer="flat")
    check(pool(2).run(f"{HERE}resume", placed=target, where=where, optimizer="flat"))


@pytest.mark.parametrize("adaptive", [True, False])
@pytest.mark.parametrize("target", ["fsdp1", "fsdp2"])
def test_a_ddp_file_of_several_groups_is_not_lightnings(
    pool: Ranks, saved: Callable[..., str], target: str, adaptive: bool
) -> None:
    """Lightning fails with AdamW too. If this test fails one day, the path can be supported."""
    where = saved("ddp", 2, adaptive=adaptive)
    answers = pool(2).attempt(f"{HERE}resume", placed=target, where=where, adaptive=adaptive)
    for answer in answers:
        assert isinstance(answer, RankError) and ("size" in answer.text or "shape" in answer.text)


def test_lightnings_tool_makes_one_file_of_fsdp1s_shards(pool: Ranks, saved: Callable[..., str]) -> None:
    where = saved("fsdp1", 2)
    tool = [PYTHON, "-m", "lightning.pytorch.utilities.consolidate_checkpoint", where]
    subprocess.run(tool, check=True, capture_output=True, timeout=120)
    for placed, world in (("ddp", 1), ("fsdp1", 2), ("fsdp2", 2)):
        check(pool(world).run(f"{HERE}resume", placed=placed, where=f"{where}.consolidated"))


def test_amsgrad_is_refused_before_a_weight_moves(pool: Ranks, tmp_path: Path) -> None:
    """torch.distributed.checkpoint would leave the state of amsgrad out without an error."""
    where = str(tmp_path / "amsgrad.ckpt")
    pool(2).run(f"{HERE}fit_and_save", placed="fsdp2", where=where, optimizer="amsgrad", adaptive=False)
    answers = pool(2).attempt(f"{HERE}resume", placed="fsdp2", where=where, switched=True)
    assert all(answer.kind == "ValueError" and "amsgrad=True" in answer.text for answer in answers)


def test_the_interval_resumes_at_another_world_size(pool: Ranks, tmp_path: Path) -> None:
    """The log interval that the checkpoint falls into is complete, with one process as with two."""
    for placed in ("ddp", "fsdp2"):
        where = str(tmp_path / f"{placed}.ckpt")
        pool(2).run(f"{HERE}fit_and_save", placed=placed, where=where, of_callback={"log_every_n_steps": 3})
        for world in (1, 2):
            (found, expected), *_ = pool(world).run(f"{HERE}interval_after_resume", placed=placed, where=where)
            assert found == pytest.approx(expected, rel=1e-9), (placed, world)


def test_skipped_steps_are_counted_on(pool: Ranks, tmp_path: Path) -> None:
    """FSDP and model parallel restore a callback after on_fit_start, the other strategies before."""
    for placed in ("ddp", "fsdp1", "fsdp2"):
        where = str(tmp_path / f"{placed}.ckpt")
        pool(2).run(f"{HERE}fit_and_save", placed=placed, where=where, bad=(2,))
        ranks = pool(2).run(f"{HERE}skipped_after_resume", placed=placed, where=where)
        assert ranks == [1.0, 1.0]


def test_the_file_is_read_without_pickle(saved: Callable[..., str]) -> None:
    for placed in ("ddp", "fsdp2_full", "fsdp1_full"):
        state = torch.load(saved(placed, 2), weights_only=True)["optimizer_states"][0]
        assert {"beta_prod", "beta", "prev_lr", "step", "exp_avg", "exp_avg_sq"} <= set(
            next(iter(state["state"].values()))
        )
