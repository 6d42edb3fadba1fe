"""DeepSpeed compiles a communication operator once: a compiler must be there."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator

import pytest

from tests.sharding.pool import Pool


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = None
    if not shutil.which("g++") and not os.environ.get("CI"):
        reason = "DeepSpeed compiles a CPU operator at its first start, and there is no g++"
    elif " " in sys.prefix:
        reason = f"torch's extension builder cannot link in a folder with a space: {sys.prefix}"
    for item in items:
        if reason and "tests/deepspeed" in str(item.path):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def pool() -> Iterator[Callable[[int], Pool]]:
    """``pool(world)``: processes that keep DeepSpeed imported."""
    pools: dict[int, Pool] = {}
    yield lambda world: pools.setdefault(world, Pool(world))
    for one in pools.values():
        one.stop()
