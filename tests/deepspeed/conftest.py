"""DeepSpeed compiles a communication operator once: a compiler must be there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator

import pytest

from tests.sharding.pool import Pool


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if shutil.which("g++") or os.environ.get("CI"):
        return
    skip = pytest.mark.skip(reason="DeepSpeed compiles a CPU operator at its first start, and there is no g++")
    for item in items:
        if "tests/deepspeed" in str(item.path):
            item.add_marker(skip)


@pytest.fixture(scope="session")
def pool() -> Iterator[Callable[[int], Pool]]:
    """``pool(world)``: processes that keep DeepSpeed imported."""
    pools: dict[int, Pool] = {}
    yield lambda world: pools.setdefault(world, Pool(world))
    for one in pools.values():
        one.stop()
