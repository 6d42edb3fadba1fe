"""Faults of runs on clusters: each function hits a run of two torchrun agents and returns what it did."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.processes import wait_until

from .runs import PROGRAM, Agents

Kill = Callable[[Agents, random.Random], str]


def kill_rank(agents: Agents, rng: random.Random) -> str:
    """SIGKILL one rank: torchrun restarts all of them."""
    index = rng.randrange(len(agents.nodes))
    node = agents.nodes[index]
    wait_until(lambda: bool(node.workers(PROGRAM)), f"no rank on node {index}")
    with contextlib.suppress(ProcessLookupError):  # it may be exiting already
        os.kill(node.workers(PROGRAM)[0], signal.SIGKILL)
    return f"the rank on node {index}"


def kill_node(agents: Agents, rng: random.Random) -> str:
    """SIGKILL everything on a node and start a new agent. Losing the first node also ends the other agent."""
    index = rng.randrange(len(agents.nodes))
    agents.nodes[index].lose()
    if index == 0:
        agents.processes[1].wait(300)
        agents.restart(1)
    agents.restart(index)
    return f"node {index}; a new one came"


def terminate(agents: Agents, rng: random.Random) -> str:
    """Send SIGTERM to the agents, as a scheduler does before it takes the nodes away; run the same command again."""
    for process in agents.processes:
        process.terminate()
    states = agents.end(300)
    for index in range(len(agents.processes)):
        agents.restart(index)
    return f"to both agents, which ended with {states}; started again"


def truncate(agents: Agents, rng: random.Random) -> str:
    """Cut the power of all nodes, so that the newest checkpoint loses its end."""
    for node in agents.nodes:
        node.lose()
    last = agents.root / "checkpoints" / "last.ckpt"
    said = "there was no checkpoint yet"
    if last.exists():
        size = last.stat().st_size
        left = rng.randrange(size)
        os.truncate(last, left)
        said = f"last.ckpt cut to {left} of {size} bytes"
    for index in range(len(agents.nodes)):
        agents.restart(index)
    return f"both nodes lost, {said}"


def fill_disk(agents: Agents, rng: random.Random) -> str:
    """Fill the disk, and make room again after a write has failed."""
    ballast = agents.root / "ballast"
    before = [log.stat().st_size for log in agents.logs]
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))

    def failed() -> bool:
        new = b"".join(log.read_bytes()[start:] for log, start in zip(agents.logs, before, strict=True))
        return b"No space left on device" in new

    try:
        wait_until(failed, "a full disk was not noticed")
    finally:
        ballast.unlink()
    return "full until a write failed"


KINDS: dict[str, Kill] = {
    "SIGKILL rank": kill_rank,
    "SIGKILL node": kill_node,
    "SIGTERM": terminate,
    "truncated checkpoint": truncate,
    "full disk": fill_disk,
}


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: int = 64) -> Iterator[None]:
    """Mount a separate disk for a run."""
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
