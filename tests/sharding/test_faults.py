"""One rank has bad gradients, one has none, or one dies: no rank hangs, all agree, and the run resumes."""

from __future__ import annotations

import json
import math
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.python import PYTHON
from tests.sharding.fault_steps import BAD, END
from tests.sharding.pool import Pool

ROOT = Path(__file__).parents[2]
FAULTS = "tests.sharding.fault_steps:"
PLACES = [
    ("fsdp2", 2),
    ("fsdp2", 4),
    ("fsdp1_full", 2),
    ("fsdp1_full", 4),
    ("ddp", 2),
    ("ddp", 4),
    ("tp", 2),
    ("tp", 4),
    ("hsdp", 4),
    ("fsdp2_tp", 4),
]


WIDE = [place for place in PLACES if place[1] == 4]
BAD_STEPS = [(*place, math.nan, "gradient") for place in PLACES] + [
    (*place, value, where) for place in WIDE for value, where in ((math.inf, "gradient"), (math.nan, "batch"))
]


@pytest.mark.parametrize(("layout", "world", "value", "where"), BAD_STEPS)
def test_a_bad_gradient_on_one_rank_is_a_step_that_all_skip(
    pool: Callable[[int], Pool], layout: str, world: int, value: float, where: str
) -> None:
    """This includes a rank with a copy, whose sums do not count. The run continues as in one process."""
    ranks = pool(world).run(f"{FAULTS}bad_gradient", layout=layout, value=value, where=where)
    for rank in ranks:
        assert rank["skipped"] and rank["untouched"] and not rank["skipped later"]
        assert rank["bits"] == ranks[0]["bits"] and rank["bits"][BAD] == rank["bits"][BAD - 1]
        assert rank["betas"] <= 1e-12 and rank["weights"] <= 1e-12
        assert rank["interior"] > 0.15


@pytest.mark.parametrize(("layout", "world"), [("fsdp2", 2), *WIDE])
def test_a_bad_gradient_that_is_propagated(pool: Callable[[int], Pool], layout: str, world: int) -> None:
    """The tensor with the bad gradient uses the cap on every rank. The others use their own beta."""
    arguments = {"layout": layout, "value": math.nan, "where": "gradient", "nonfinite": "propagate"}
    ranks = pool(world).run(f"{FAULTS}bad_gradient", **arguments)
    for rank in ranks:
        assert not rank["skipped"] and not rank["untouched"]
        assert rank["bits"] == ranks[0]["bits"]
        assert rank["bad step"] <= 1e-12 and rank["own"] == pytest.approx(0.89)


@pytest.mark.parametrize("world", [2, 4])
def test_a_module_that_a_rank_does_not_use_under_ddp(pool: Callable[[int], Pool], world: int) -> None:
    ranks = pool(world).run(f"{FAULTS}unused_module_under_ddp")
    for rank in ranks:
        assert rank["bits"] == ranks[0]["bits"]
        assert rank["betas"] <= 1e-12 and rank["weights"] <= 1e-12
        assert rank["steps"] == rank["expected"] and set(rank["steps"]) == {7.0}
        assert rank["interior"] > 0.15


@pytest.mark.parametrize(("layout", "world"), [("fsdp2", 2), ("fsdp2", 4), ("ddp", 2), ("ddp", 4), ("hsdp", 4)])
def test_a_gradient_that_one_rank_lacks(pool: Callable[[int], Pool], layout: str, world: int) -> None:
    """Every rank enters the collective; a tensor without a gradient on any rank takes no part."""
    ranks = pool(world).run(f"{FAULTS}gradients_missing_on_one_rank", layout=layout)
    for number, rank in enumerate(ranks):
        assert rank["bits"] == ranks[0]["bits"] and len(rank["bits"]) == END
        assert rank["moved"] == [step != BAD + 1 and not (step == BAD and number == world - 1) for step in range(END)]
        assert rank["counted"] == [float(step != BAD + 1) for step in range(END)]


def test_a_step_that_one_rank_leaves_out_is_reported(pool: Callable[[int], Pool]) -> None:
    said, *others = pool(4).run(f"{FAULTS}step_left_out_by_one_rank")
    assert "Timed out" in said and "all ranks that share them must enter" in said and "GradScaler" in said
    assert others == ["", "", ""]


def launch(world: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Launch torchrun of the failure tests on a free port."""
    command = [PYTHON, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    command += ["-m", "tests.sharding.fault_run", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, timeout=180, env=environment, cwd=ROOT)


def answers(where: Path, world: int) -> list[dict | None]:
    files = [where / f"rank{rank}.json" for rank in range(world)]
    found = [json.loads(file.read_text()) if file.exists() else None for file in files]
    for file in files:
        file.unlink(missing_ok=True)
    return found


@pytest.mark.nightly("killed ranks")
@pytest.mark.slow
@pytest.mark.parametrize(("world", "point"), [(2, "sums"), (4, "update")])
def test_a_rank_that_is_killed_in_mid_step(pool: Callable[[int], Pool], tmp_path: Path, world: int, point: str) -> None:
    """The other ranks get an error within the group's timeout; a new launch ends bitwise as an unbroken run."""
    victim = world - 1
    killed = launch(world, str(tmp_path), f"{victim},5,{point}")
    assert killed.returncode != 0
    found = answers(tmp_path, world)
    assert found[victim] is None
    for survivor in found[:victim]:
        assert "error" in survivor
    assert (tmp_path / "latest").read_text() == "4"

    again = launch(world, str(tmp_path))
    assert again.returncode == 0, again.stderr
    resumed = answers(tmp_path, world)
    unbroken = pool(world).run("tests.sharding.fault_run:train_to_the_end")
    for one, other in zip(resumed, unbroken, strict=True):
        assert one["start"] == 4 and one["bits"] == other["bits"][4:]
        assert one["held"] == other["held"]
