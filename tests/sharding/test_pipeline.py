"""Two pipeline stages, each over its own ranks: one beta_t per tensor, or one for the whole model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.sharding.model import make_net
from tests.sharding.pool import Pool

WORKER = "tests.sharding.pipeline:"
LAYOUTS = [("alone", 2), ("fsdp", 4), ("ddp", 4), ("tp", 4)]


def check(ranks: list[dict[str, Any]], collectives: int) -> None:
    stages = {rank["stage"]: rank for rank in ranks}
    names = sorted(stages[0]["names"] + stages[1]["names"])
    assert names == sorted(name for name, _ in make_net(torch.float64).named_parameters())
    assert ranks[0]["share"] > 0.2, "the clamps would hide a wrong sum"
    for rank in ranks:
        assert rank["beta"] <= 1e-12 and rank["weights"] <= 1e-12 and rank["norm"] <= 1e-12
        assert rank["momentum"] == rank["names"], "a stage reports its own tensors"
        assert rank["bits"] == stages[rank["stage"]]["bits"]
        for counts in rank["collectives"][1:]:
            assert counts == ({"c10d.allreduce_": collectives} if collectives else {})


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
@pytest.mark.parametrize(("layout", "world"), LAYOUTS)
def test_one_beta_for_each_tensor_needs_no_group(
    pool: Callable[[int], Pool], layout: str, world: int, kind: str
) -> None:
    """One collective per stage, and none if one rank is the stage."""
    ranks = pool(world).run(f"{WORKER}run", layout=layout, kind=kind, scope="tensor", pipeline=None)
    check(ranks, collectives=int(world == 4))


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
@pytest.mark.parametrize("scope", ["global", "group", "tensor"])
@pytest.mark.parametrize(("layout", "world"), LAYOUTS)
def test_with_the_group_of_the_stages(
    pool: Callable[[int], Pool], layout: str, world: int, scope: str, kind: str
) -> None:
    """One collective inside the stage and one across the stages."""
    ranks = pool(world).run(f"{WORKER}run", layout=layout, kind=kind, scope=scope, pipeline="stages")
    check(ranks, collectives=1 + int(world == 4))
    if scope == "global":
        last = [set(rank["bits"][-1].values()) for rank in ranks]
        assert all(betas == last[0] and len(betas) == 1 for betas in last), "one beta for both stages"


@pytest.mark.parametrize(("layout", "world"), LAYOUTS)
def test_clipping_over_the_stages(pool: Callable[[int], Pool], layout: str, world: int) -> None:
    """The norm is that of both stages; its collectives are additional to the step's."""
    arguments = {"layout": layout, "kind": "adamw", "scope": "global", "pipeline": "stages", "clip": 0.05}
    check(pool(world).run(f"{WORKER}run", **arguments), collectives=2 * (1 + int(world == 4)))


@pytest.mark.parametrize(("scope", "what"), [("global", "step"), ("group", "step"), ("tensor", "clip")])
@pytest.mark.parametrize("layout", ["fsdp", "ddp", "tp"])
def test_without_the_group_of_the_stages(pool: Callable[[int], Pool], layout: str, scope: str, what: str) -> None:
    arguments = {"layout": layout, "scope": scope, "pipeline": None, "what": what, "cure": True}
    for rank in pool(4).run(f"{WORKER}attempt", timeout=60, **arguments):
        needs = "the global gradient norm" if what == "clip" else f"scope='{scope}'"
        assert rank["text"] is not None and rank["text"].startswith(f"{needs} needs the whole model")
        assert "set optimizer.pipeline_group to the group of one rank from each stage" in rank["text"]
        assert not rank["moved"] and not rank["states"] and rank["cured"]


@pytest.mark.parametrize("pipeline", ["inside", "world"])
@pytest.mark.parametrize("layout", ["fsdp", "ddp", "tp"])
def test_a_pipeline_group_that_overlaps_the_stage(pool: Callable[[int], Pool], layout: str, pipeline: str) -> None:
    arguments = {"layout": layout, "scope": "global", "pipeline": pipeline, "cure": True}
    for rank in pool(4).run(f"{WORKER}attempt", timeout=60, **arguments):
        assert rank["text"] is not None and rank["text"].startswith("pipeline_group has ranks")
        assert "hold the same stage's parameters: give it one rank of each stage" in rank["text"]
        assert not rank["moved"] and not rank["states"] and rank["cured"]


def test_stages_with_other_numbers_of_groups(pool: Callable[[int], Pool]) -> None:
    """Scope "group" sums the first groups of all stages, then the second ones; scope "global" sums everything."""
    arguments = {"layout": "fsdp", "pipeline": "stages", "what": "uneven"}
    for rank in pool(4).run(f"{WORKER}attempt", timeout=60, scope="group", **arguments):
        assert rank["text"] is not None and "stages do not fit together" in rank["text"]
        assert "parameter groups, another rank does not. Build every stage's optimizer with the same" in rank["text"]
        assert not rank["moved"] and not rank["states"]
    for rank in pool(4).run(f"{WORKER}attempt", timeout=60, scope="global", **arguments):
        assert rank["text"] is None and rank["moved"]


@pytest.mark.parametrize("scope", ["tensor", "global"])
@pytest.mark.parametrize(("layout", "world"), LAYOUTS)
def test_what_is_not_finite_in_one_stage_skips_all(
    pool: Callable[[int], Pool], layout: str, world: int, scope: str
) -> None:
    for rank in pool(world).run(f"{WORKER}one_nan", layout=layout, scope=scope, pipeline="stages"):
        assert rank["skipped"] == [False, True, False] and rank["moved"] == [True, False, True]


def test_without_their_group_stages_skip_alone(pool: Callable[[int], Pool]) -> None:
    """This is why a pipeline_group is worth a collective, even with scope "tensor"."""
    for rank in pool(4).run(f"{WORKER}one_nan", layout="fsdp", scope="tensor", pipeline=None):
        assert rank["skipped"] == [False, rank["stage"] == 1, False]
