"""Each layout against one process that holds the whole model: raw beta_t, weights, equal bits, collectives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.sharding.layouts import LAYOUTS
from tests.sharding.pool import Pool
from tests.sharding.steps import assert_as_one_process

CASES = [(layout, world) for layout, (_, worlds) in LAYOUTS.items() for world in worlds]
SMALLEST = [(layout, min(worlds)) for layout, (_, worlds) in LAYOUTS.items()]
FOR_AMSGD = ("fsdp2_without_mesh", "fsdp2_ignored", "hsdp", "tp", "tp_ddp", "fsdp2_beside_tp", "two_roots")
FOR_AMSGD += ("fsdp1_full", "fsdp1_no_shard", "fsdp1_ignored", "fsdp1_flat_hybrid", "fsdp1_unbound")
WITH_EMPTY_SHARDS = ("fsdp2", "fsdp2_tp", "hsdp", "fsdp1_full", "fsdp1_hybrid", "fsdp1_unbound")
LIMITS = {"float64": 1e-12, "float32": 2e-5}
FLAT_LIMIT = 4e-5  # limit of float32 in FSDP1's flat parameters

# torch's own code warns.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def scopes_of(layout: str) -> tuple[str, str]:
    """Return the scopes of a layout: a flat parameter has one state for all its tensors and refuses scope "tensor"."""
    return ("global", "group") if layout.startswith("fsdp1_flat") else ("tensor", "global")


def check(ranks: list[dict[str, Any]], dtype: str, limit: float | None = None) -> None:
    assert_as_one_process(ranks, LIMITS[dtype] if limit is None else limit)
    for rank in ranks:
        check_collectives(rank)


def check_collectives(rank: dict[str, Any]) -> None:
    """Require one all-reduce for the sums, and a functional one per Partial gradient.

    The first step also compares what ranks hold, and AMAdamW's votes on the kernels.
    """
    regular = {"c10d.allreduce_": rank["expected"], "c10d_functional.all_reduce": rank["partial"]}
    regular = {operator: count for operator, count in regular.items() if count}
    at_first, later = rank["collectives"]
    assert later == regular
    assert at_first == {"c10d.allgather_": 1, **regular, "c10d.allreduce_": rank["expected"] + rank["votes"]}
    assert f"{rank['expected']} all-reduce a step: 18 x 4 numbers over" in rank["described"]


def run(
    pool: Callable[[int], Pool], layout: str, world: int, kind: str, scope: str, dtype: str, **options: Any
) -> list[Any]:
    arguments = {"layout": layout, "kind": kind, "scope": scope, "dtype": dtype, **options}
    return pool(world).run("tests.sharding.steps:compare", **arguments)


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "world"), CASES)
def test_amadamw_is_that_of_one_process(pool: Callable[[int], Pool], layout: str, world: int) -> None:
    for scope in scopes_of(layout):
        ranks = run(pool, layout, world, "adamw", scope, "float64")
        check(ranks, "float64")
        if layout in WITH_EMPTY_SHARDS and world == 4:
            assert any(rank["empty"] for rank in ranks), "no rank without elements was tried"


@pytest.mark.slow
@pytest.mark.parametrize("layout", FOR_AMSGD)
def test_amsgd_is_that_of_one_process(pool: Callable[[int], Pool], layout: str) -> None:
    check(run(pool, layout, 4, "sgd", "global", "float64"), "float64")


@pytest.mark.parametrize("layout", ["ddp", "fsdp2", "fsdp2_tp", "tp_sequence", "hsdp_tp", "fsdp1_hybrid"])
def test_amsgd_with_one_beta_for_each_tensor(pool: Callable[[int], Pool], layout: str) -> None:
    check(run(pool, layout, 4, "sgd", "tensor", "float64"), "float64")


@pytest.mark.parametrize("layout", ["ddp", "fsdp2_ignored", "fsdp2_tp", "two_roots", "fsdp1_ignored"])
def test_one_beta_for_each_group(pool: Callable[[int], Pool], layout: str) -> None:
    check(run(pool, layout, 4, "adamw", "group", "float64"), "float64")


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "world"), SMALLEST)
def test_in_float32(pool: Callable[[int], Pool], layout: str, world: int) -> None:
    limit = FLAT_LIMIT if layout.startswith("fsdp1_flat") else None
    check(run(pool, layout, world, "adamw", scopes_of(layout)[0], "float32"), "float32", limit)


@pytest.mark.parametrize("layout", ["fsdp2_ignored", "tp_sequence", "fsdp1_full"])
def test_amsgd_in_float32(pool: Callable[[int], Pool], layout: str) -> None:
    check(run(pool, layout, 4, "sgd", "global", "float32"), "float32")
