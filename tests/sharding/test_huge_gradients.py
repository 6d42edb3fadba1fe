"""One rank has a finite gradient whose square overflows: all ranks drop the step, and the run still learns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.sharding.pool import Pool

KERNELS: dict[str, dict[str, Any]] = {
    "chunked": {"fused": False, "chunked": True},
    "single_tensor": {"foreach": False},
    "foreach": {"foreach": True},
    "C++ loop": {"fused": True},
    "torch.compile": {"fused": True, "compiled": True},
}
EACH = [pytest.param(name, marks=pytest.mark.slow if name == "torch.compile" else ()) for name in KERNELS]


def run(
    pool: Callable[[int], Pool], layout: str, world: int = 2, fall: float = 0.9, **arguments: Any
) -> list[dict[str, Any]]:
    ranks = pool(world).run("tests.sharding.huge_steps:huge_gradient", layout=layout, timeout=300, **arguments)
    for rank in ranks:
        assert rank["finite"]
        assert rank["weights"] == ranks[0]["weights"]
        assert rank["loss"][1] < fall * rank["loss"][0], rank["loss"]
    return ranks


@pytest.mark.parametrize("kernel", EACH)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_all_ranks_drop_the_step(pool: Callable[[int], Pool], layout: str, dtype: str, kernel: str) -> None:
    for rank in run(pool, layout, dtype=dtype, **KERNELS[kernel]):
        assert rank["skipped"] and rank["untouched"] and rank["skipped in all"] == 2
        assert kernel in rank["described"]


@pytest.mark.parametrize(("layout", "world"), [("fsdp1_full", 2), ("hsdp", 4), ("tp", 2)])
def test_in_other_layouts(pool: Callable[[int], Pool], layout: str, world: int) -> None:
    for rank in run(pool, layout, world, dtype="float32", value=2e19):
        assert rank["skipped"] and rank["untouched"] and rank["skipped in all"] == 2


@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_of_sgd(pool: Callable[[int], Pool], layout: str) -> None:
    for rank in run(pool, layout, dtype="float32", fall=0.98, loss_gap="first_order"):
        assert rank["skipped"] and rank["untouched"] and rank["skipped in all"] == 2


def test_what_clipping_makes_small_is_taken(pool: Callable[[int], Pool]) -> None:
    """The norm is a float64 sum, which can hold it, so the direction of the huge gradient counts on all ranks alike."""
    for rank in run(pool, "fsdp2", dtype="float32", clip=1.0):
        assert not rank["skipped"] and rank["skipped in all"] == 0
