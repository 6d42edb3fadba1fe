"""recipes/launch/torchrun.sh on two nodes that share only a cable and the file system."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.processes import wait_until

from .conftest import EVERY, STEPS
from .namespaces import Node
from .runs import PROGRAM, Agents, changed, newest_step

pytestmark = pytest.mark.nightly("network namespaces")
Nodes = tuple[Node, Node]


def test_two_nodes_train_to_the_bits_of_one(
    nodes: Nodes, tmp_path: Path, run_options: list[str], unbroken: Path
) -> None:
    agents = Agents(nodes, tmp_path / "run", run_options)
    assert agents.end(240) == [0, 0], agents.tail()
    assert "All distributed processes registered. Starting with 2 processes" in agents.logs[0].read_text()
    assert changed(agents.root, unbroken) == []


def test_a_killed_rank_is_started_again_on_both_nodes(
    nodes: Nodes, tmp_path: Path, run_options: list[str], unbroken: Path
) -> None:
    agents = Agents(nodes, tmp_path / "run", run_options)
    wait_until(lambda: newest_step(agents.root) >= 2 * EVERY, "no checkpoint")
    [rank] = nodes[1].workers(PROGRAM)
    os.kill(rank, signal.SIGKILL)
    assert agents.end(240) == [0, 0], agents.tail()
    assert "Restored all states from the checkpoint" in agents.logs[0].read_text()
    assert agents.starts == 2  # the agents themselves kept running
    assert changed(agents.root, unbroken) == []


def test_a_new_node_takes_the_place_of_a_lost_one(
    nodes: Nodes, tmp_path: Path, run_options: list[str], unbroken: Path
) -> None:
    agents = Agents(nodes, tmp_path / "run", run_options)
    wait_until(lambda: newest_step(agents.root) >= 2 * EVERY, "no checkpoint")
    nodes[1].lose()
    agents.restart(1)
    assert agents.end(240) == [0, 0], agents.tail()
    assert "Restored all states from the checkpoint" in agents.logs[0].read_text()
    assert newest_step(agents.root) == STEPS
    assert changed(agents.root, unbroken) == []
