"""DeepSpeed compiles a communication operator once, which needs a compiler."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.deepspeed.build import build_operator, refusal
from tests.lacking import pytest_runtest_makereport  # noqa: F401
from tests.sharding.pool import Pool, pools


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = refusal()
    for item in items:
        if reason and "tests/deepspeed" in str(item.path):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session", autouse=True)
def compiled() -> None:
    build_operator()


@pytest.fixture(scope="session")
def pool(compiled: None) -> Iterator[Callable[[int], Pool]]:
    """Return ``pool(world)``, whose processes keep DeepSpeed imported."""
    with pools() as start:
        yield start
