"""tests/gpu runs on a GPU; AM_GPU_TESTS_DEVICE=cpu rehearses it on a CPU. Otherwise it is skipped at once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.gates import DEVICE_VARIABLE
from tests.lacking import pytest_runtest_makereport  # noqa: F401

if TYPE_CHECKING:  # these modules read variables that the session sets later
    import torch

    from tests.sharding.pool import Pool


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = refusal()
    for item in items:
        if reason and item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.skip(reason=reason))


def refusal() -> str | None:
    """Return the reason why no test can run, or None."""
    wanted = os.environ.get(DEVICE_VARIABLE)
    if wanted is None:
        return "a GPU is hidden from all sessions but those of tests/gpu alone"
    if wanted not in ("cpu", "cuda"):
        return f"{DEVICE_VARIABLE} is {wanted!r}, neither 'cpu' nor 'cuda'"
    import torch

    return "needs a GPU" if wanted == "cuda" and not torch.cuda.is_available() else None


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Return the device on which the optimizers step."""
    from tests.device import DEVICE

    return DEVICE


@pytest.fixture(scope="session")
def alone() -> Iterator[Pool]:
    """Return one rank of NCCL (gloo in a rehearsal)."""
    from tests.device import BACKEND

    yield from _pool(1, BACKEND)


@pytest.fixture(scope="session")
def pair() -> Iterator[Pool]:
    """Return two ranks on one GPU, which gloo supports and NCCL does not."""
    yield from _pool(2, "gloo")


def _pool(world: int, backend: str) -> Iterator[Pool]:
    from tests.sharding.pool import Pool

    pool = Pool(world, backend)
    try:
        yield pool
    finally:
        pool.stop()
