"""Sharded models under another default device, and models that are moved or cast while they train."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.sharding.pool import Pool

STEPS = "tests.sharding.moved_steps:"
LIMITS = {"cpu": 0.0, "double": 1e-4, "float64": 1e-4, "half": 3e-2, "bfloat16": 2e-1}


@pytest.mark.parametrize(
    "options", [{"fused": False}, {"foreach": True}, {"fused": True}], ids=["chunked", "foreach", "fused"]
)
@pytest.mark.parametrize(("layout", "scope"), [("ddp", "tensor"), ("fsdp2", "global"), ("fsdp1_full", "tensor")])
def test_another_default_device(pool: Callable[[int], Pool], layout: str, scope: str, options: dict[str, Any]) -> None:
    ranks = pool(2).run(f"{STEPS}under_another_default_device", layout=layout, scope=scope, **options)
    for rank in ranks:
        assert rank["same"] and rank["bits"] == ranks[0]["bits"]


CASTS = ["float64", "half", "bfloat16"]


@pytest.mark.parametrize(
    ("layout", "how", "at"),
    [("fsdp2", "cpu", 3), ("ddp", "cpu", 3), *[("fsdp2", how, 0) for how in ("cpu", *CASTS)]],
)
def test_a_model_that_is_moved_or_cast(pool: Callable[[int], Pool], layout: str, how: str, at: int) -> None:
    """FSDP2 swaps the tensors in the same parameters. AdamW continues, too."""
    ranks = pool(2).run(f"{STEPS}moved", layout=layout, how=how, at=at)
    for rank in ranks:
        assert rank["bits"] == ranks[0]["bits"] and not rank["skipped"]
        assert len(rank["dtypes"]) == 1 and rank["devices"] == {"cpu"}
        assert rank["betas"] <= 10 * LIMITS[how] and rank["weights"] <= LIMITS[how], rank
    for rank in pool(2).run(f"{STEPS}cast_and_stepped", layout=layout, how=how, at=at, ours=False):
        assert rank["error"] is None, rank


@pytest.mark.parametrize("how", CASTS)
@pytest.mark.parametrize("layout", ["fsdp2", "ddp"])
def test_a_step_after_a_cast_in_mid_run(pool: Callable[[int], Pool], layout: str, how: str) -> None:
    """The forward of FSDP2 and DDP keeps the old dtype. Our step works, while AdamW's fails."""
    ranks = pool(2).run(f"{STEPS}cast_and_stepped", layout=layout, how=how, at=3, ours=True)
    for rank in ranks:
        assert rank["error"] is None and rank["weights"] == ranks[0]["weights"]
        assert rank["steps"] == {5.0} and rank["finite"] and rank["moved"]
    for rank in pool(2).run(f"{STEPS}cast_and_stepped", layout=layout, how=how, at=3, ours=False):
        assert "dtype" in rank["error"]
