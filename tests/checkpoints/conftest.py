"""Pools that live as long as the test session."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.lacking import pytest_runtest_makereport  # noqa: F401
from tests.sharding.pool import Pool, pools


@pytest.fixture(scope="session")
def pool() -> Iterator[Callable[[int], Pool]]:
    """Return ``pool(world)``, which returns a running group of ``world`` processes."""
    with pools() as start:
        yield start
