"""A strategy unknown to the package needs one class and one entry in the table."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.sharding.pool import Pool

WORKER = "tests.sharding.new_strategy:"


@pytest.mark.parametrize("world", [2, 4])
def test_it_is_that_of_one_process(pool: Callable[[int], Pool], world: int) -> None:
    for rank in pool(world).run(f"{WORKER}compare", scope="global"):
        assert rank["weights"] <= 1e-12 and rank["betas"] <= 1e-12
        assert "2 cut in parts" in rank["described"] and "1 all-reduce a step" in rank["described"]
        assert rank["one_state_dtype"] == [True, True]


def test_what_it_refuses_is_refused(pool: Callable[[int], Pool]) -> None:
    assert pool(2).run(f"{WORKER}refused") == ["cut in too many parts"] * 2
