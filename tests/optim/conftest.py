"""A process in which Triton interprets its kernels, started once per test session; a foreign default device."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests import foreign_device
from tests.optim.every_size import chunked_for_every_size
from tests.sharding.pool import Pool

foreign_device.install()  # before the test modules are imported


@pytest.fixture(autouse=True)
def every_size() -> Iterator[None]:
    with chunked_for_every_size():
        yield


@pytest.fixture(scope="session")
def interpreter() -> Iterator[Pool]:
    """Start a process for Triton's interpreter, because Triton decides at its import whether it interprets."""
    pool = Pool(1)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(os.environ, "TRITON_INTERPRET", "1")
            pool.run("tests.optim.interpreted:check_interpreter")
        if reason := pool.run("tests.optim.interpreted:refusal")[0]:
            pytest.skip(reason)
        yield pool
    finally:
        pool.stop()
