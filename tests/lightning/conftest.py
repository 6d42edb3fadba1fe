"""Pools of ranks that have imported Lightning; they live as long as the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.sharding.pool import Pool


@pytest.fixture(scope="package")
def pool() -> Iterator[Callable[[int], Pool]]:
    """``pool(world)``: a running group of that many processes."""
    pools: dict[int, Pool] = {}
    yield lambda world: pools.setdefault(world, Pool(world))
    for one in pools.values():
        one.stop()
