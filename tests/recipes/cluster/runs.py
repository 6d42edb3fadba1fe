"""A tiny run over two processes, started by the launchers of recipes/launch, and its result."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from tests.recipes.commands import RECIPES, TINY, differences, training_state

from .namespaces import Node, command_line

LAUNCH = RECIPES / "launch"
PROGRAM = RECIPES / "pretrain.py"


def options(source: Path, steps: int, every: int) -> list[str]:
    """Return pretrain.py's options in addition to the launchers': the laptop recipe with a tiny model."""
    settings = {
        **TINY,
        "data.source": source,
        "trainer.max_steps": steps,
        "trainer.val_check_interval": steps // 2,
        "checkpoint.every_n_train_steps": every,
    }
    return [text for key, value in settings.items() for text in (f"--{key}", str(value))]


def variables(root: Path, **others: str) -> dict[str, str]:
    """Return the environment of a launcher: two nodes of one process, unless `others` override it."""
    sizes = {"NODES": "2", "GPUS_PER_NODE": "1", "RUN_DIR": str(root), "OMP_NUM_THREADS": "1"}
    return {**os.environ, **sizes, **others}


def newest_step(root: Path) -> int:
    """Return the newest step of the checkpoints in a run's folder, or 0 without one."""
    names = [path.stem.removeprefix("step-") for path in (root / "checkpoints").glob("step-*.ckpt")]
    return max((int(name) for name in names if name.isdigit()), default=0)


def processes_of(root: Path, program: Path) -> list[int]:
    """Return the processes that run `program` with RUN_DIR `root`: ranks and what they forked, not launchers."""
    mark, found = f"RUN_DIR={root}".encode(), []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            pid = int(entry.name)
            if os.fsencode(program) in command_line(pid) and mark in (entry / "environ").read_bytes().split(b"\0"):
                found.append(pid)
    return found


def changed(root: Path, reference: Path) -> list[str]:
    """Return where the last checkpoints of two runs differ in a bit."""
    states = [training_state(folder / "checkpoints" / "last.ckpt") for folder in (root, reference)]
    return differences(*states)


class Agents:
    """torchrun.sh on two nodes, and a scheduler that restarts a failed agent.

    Attributes:
        starts: number of times that an agent was started.
        logs: output of the agents and their workers.
    """

    def __init__(self, nodes: Sequence[Node], root: Path, args: Sequence[str], **others: str) -> None:
        self.nodes, self.root, self.args = nodes, root, args
        self.env = variables(root, MASTER_ADDR=nodes[0].address, **others)
        self.logs = [root.with_name(f"{root.name}.node{i}.log") for i in range(len(nodes))]
        self.starts = 0
        self.processes = [self._start(i) for i in range(len(nodes))]

    def _start(self, index: int) -> subprocess.Popen[bytes]:
        self.starts += 1
        command = [str(LAUNCH / "torchrun.sh"), *self.args]
        return self.nodes[index].start(command, self.env, self.logs[index])

    def restart(self, index: int) -> None:
        self.processes[index].wait(60)
        self.processes[index] = self._start(index)

    def end(self, timeout: float) -> list[int]:
        """Wait for the agents and return their exit statuses."""
        deadline = time.monotonic() + timeout
        return [process.wait(max(1.0, deadline - time.monotonic())) for process in self.processes]

    def finish(self, steps: int, timeout: float) -> None:
        """Restart what fails until the run has made its steps.

        Raises:
            TimeoutError: if it does not get there; the error has the last output.
        """
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            states = [process.poll() for process in self.processes]
            if None not in states and newest_step(self.root) >= steps and 0 in states:
                return
            for index, state in enumerate(states):
                if state is not None and 0 not in states:
                    self.restart(index)
            time.sleep(0.1)
        raise TimeoutError(f"{self.root} is at step {newest_step(self.root)}:\n{self.tail()}")

    def tail(self) -> str:
        return "\n".join(f"{log.name}: {log.read_text(errors='replace')[-3000:]}" for log in self.logs)
