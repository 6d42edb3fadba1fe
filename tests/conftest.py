"""The fork server, which lives as long as the test session, the gates, and hypothesis' profiles."""

from __future__ import annotations

import os
import sys

import pytest
from hypothesis import HealthCheck, settings

from tests import operator_build
from tests.forkserver import COLD_VARIABLE, VARIABLE, ForkServer
from tests.gates import GATES, kept, let_see_gpu

SERVER = pytest.StashKey[ForkServer]()

# `ci` uses the same few examples in every run, `nightly` many new ones; HYPOTHESIS_PROFILE selects the profile.
common = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("ci", max_examples=15, derandomize=True, database=None, **common)
settings.register_profile("nightly", max_examples=100, **common)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gate", choices=GATES, help="run the tests of a gate only (tests/gates.py)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if gate := config.getoption("--gate"):
        wanted = set(kept(items, gate))
        config.hook.pytest_deselected(items=[item for item in items if item not in wanted])
        items[:] = [item for item in items if item in wanted]


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):
        return  # a worker of xdist has the variables of the session that started it
    if let_see_gpu(config.args, config.invocation_params.dir):
        return  # a process that has looked for a GPU cannot be forked into one that uses it
    os.environ |= operator_build.variables()
    if config.option.collectonly or VARIABLE in os.environ:
        return
    server = config.stash[SERVER] = ForkServer()
    os.environ |= {VARIABLE: str(server.python), COLD_VARIABLE: sys.executable}


def pytest_unconfigure(config: pytest.Config) -> None:
    if server := config.stash.get(SERVER, None):
        del os.environ[VARIABLE], os.environ[COLD_VARIABLE]
        server.stop()
