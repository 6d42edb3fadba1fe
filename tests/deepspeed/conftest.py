"""DeepSpeed compiles a communication operator once: a compiler must be there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests import operator_build
from tests.lacking import pytest_runtest_makereport  # noqa: F401
from tests.ports import free_port
from tests.python import COLD
from tests.sharding.pool import Pool, pools


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = None
    if find_spec("deepspeed") is None:
        reason = "deepspeed is not installed"
    elif not shutil.which("g++") and not os.environ.get("CI"):
        reason = "DeepSpeed compiles a CPU operator at its first start, and there is no g++"
    elif " " in sys.prefix:
        reason = f"torch's extension builder cannot link in a folder with a space: {sys.prefix}"
    for item in items:
        if reason and "tests/deepspeed" in str(item.path):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session", autouse=True)
def compiled() -> None:
    """Build the operator once, in one process: minutes on a busy machine, and a build that is killed leaves a lock on
    which every later start would wait without a word."""
    os.environ.update(operator_build.variables())
    for lock in operator_build.FOLDER.glob("deepspeed_shm_comm/lock"):
        if time.time() - lock.stat().st_mtime > 900:
            lock.unlink()
    port = free_port()
    env = {**os.environ, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    code = "import tests.deepspeed.runs, deepspeed; deepspeed.init_distributed('gloo')"
    command = [COLD, "-c", code]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        command, cwd=root, env={**env, "MASTER_PORT": str(port)}, capture_output=True, text=True, timeout=1200
    )
    assert "built successfully" in done.stdout or done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="session")
def pool(compiled: None) -> Iterator[Callable[[int], Pool]]:
    """``pool(world)``: processes that keep DeepSpeed imported."""
    with pools() as start:
        yield start
