"""Clusters that are started once, and the run that all others are compared with."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from . import namespaces, slurm
from .runs import LAUNCH, options, variables

STEPS, EVERY = 120, 10  # even a fast machine needs more than a second after the second checkpoint


@pytest.fixture(scope="session")
def run_options(corpus_folder: Path) -> list[str]:
    return options(corpus_folder, STEPS, EVERY)


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory: pytest.TempPathFactory, run_options: list[str]) -> Path:
    """Run two processes on one machine by torchrun."""
    root = tmp_path_factory.mktemp("unbroken") / "run"
    env = variables(root, NODES="1", GPUS_PER_NODE="2")
    command = [str(LAUNCH / "torchrun.sh"), *run_options]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return root


@pytest.fixture
def nodes() -> Iterator[tuple[namespaces.Node, namespaces.Node]]:
    if reason := namespaces.missing():
        pytest.skip(reason)
    with namespaces.two_nodes() as both:
        yield both


@pytest.fixture(scope="session")
def cluster() -> Iterator[slurm.Slurm]:
    if reason := slurm.missing():
        pytest.skip(reason)
    with slurm.two_node_slurm() as running:
        yield running
