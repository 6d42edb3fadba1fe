"""Checkpoints of an earlier version of the package load bitwise, and the run continues as it did then."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.checkpoints.layouts import LAYOUTS, ZERO
from tests.checkpoints.plain import PLAIN, ROUNDED
from tests.checkpoints.saved import FOLDER, differences, unpack
from tests.deepspeed.build import build_operator, refusal
from tests.sharding.pool import Pool

FRAMEWORKS = ("lightning", "accelerate")


@pytest.mark.filterwarnings("ignore:the learning rate scheduler cycles betas")
@pytest.mark.parametrize("name", PLAIN)
def test_state_dict(tmp_path: Path, name: str) -> None:
    assert differences(PLAIN[name](), unpack(name, tmp_path), rounded=name in ROUNDED) == []


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_frameworks(tmp_path: Path, name: str) -> None:
    """A Trainer resumes its checkpoint, and an Accelerator loads its folder."""
    assert importlib.import_module(f"tests.checkpoints.{name}_run").resume(unpack(name, tmp_path)) == []


@pytest.mark.parametrize("name", LAYOUTS)
def test_torch_distributed(pool: Callable[[int], Pool], tmp_path: Path, name: str) -> None:
    unpack(name, tmp_path)
    assert pool(2).run("tests.checkpoints.layouts:resume", name=name, folder=str(tmp_path)) == [[], []]


@pytest.fixture(scope="session")
def operator() -> None:
    if reason := refusal():
        pytest.skip(reason)
    build_operator()


@pytest.mark.slow
@pytest.mark.parametrize("name", ZERO)
def test_deepspeed(operator: None, pool: Callable[[int], Pool], tmp_path: Path, name: str) -> None:
    unpack(name, tmp_path)
    found = pool(2).run("tests.checkpoints.zero:resume", timeout=300, name=name, folder=str(tmp_path))
    assert found == [[], []]


def test_every_file_is_read() -> None:
    assert {path.stem for path in FOLDER.iterdir()} == {*PLAIN, *FRAMEWORKS, *LAYOUTS, *ZERO}
