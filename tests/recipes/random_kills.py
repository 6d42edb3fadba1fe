"""SIGKILL at random file-system events, then resume: the run must end with the bits of one that was never killed.

    python -m tests.recipes.random_kills [--kills 90] [--seed 0] [--programs pretrain.py ...]

Each run trains the laptop recipe with a tiny model and is killed just before a random file-system event in its folder
(a file opened for writing, a rename, link, removal or new folder), up to five times; the same command resumes it. It
prints a line for each run and exits with 1 if one ends with an error or with other weights.
"""

from __future__ import annotations

import argparse
import os
import random
import runpy
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.recipes.cluster.endings import PROGRAMS
from tests.recipes.cluster.fault_injection import corpus
from tests.recipes.commands import RECIPES, arguments, differences, final_state

EVENTS = {"os.rename", "os.link", "os.symlink", "os.remove", "os.mkdir", "os.rmdir"}  # names of sys.addaudithook
STEPS, EVERY = 12, 3  # length of a run; steps between checkpoints
KILLS_PER_RUN = 5


def main() -> int:
    """Run the drill and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=90)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--programs", nargs="+", choices=PROGRAMS, default=PROGRAMS)
    args = parser.parse_args()
    rng, kills, bad, number = random.Random(args.seed), 0, 0, 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = corpus(folder)
        whole = {program: Run(folder / "whole" / program, source, program) for program in args.programs}
        for run in whole.values():
            assert run.start(0) == 0, run.log.read_text()
        while kills < args.kills:
            program = args.programs[number % len(args.programs)]
            run = Run(folder / str(number), source, program)
            places = run.killed(rng, whole[program].events, min(KILLS_PER_RUN, args.kills - kills))
            status = run.start(0)
            different = differences(run.state(), whole[program].state()) if status == 0 else ["-"]
            result = f"ended with {status}:\n{run.log.read_text()}" if status else f"differs: {different[:3]}"
            print(f"{program}: {', '.join(places)}: {result if different else 'bitwise equal'}", flush=True)
            kills, bad, number = kills + len(places), bad + bool(different), number + 1
    print(f"{kills} kills, seed {args.seed}: {bad} of {number} runs failed")
    return int(bad > 0)


class Run:
    """A run of a program in the folder `root`."""

    def __init__(self, root: Path, source: Path, program: str) -> None:
        self.root, self.log, self.seen = root, root.with_name(f"{root.name}.log"), root.with_name(f"{root.name}.events")
        root.mkdir(parents=True)
        every = ["--checkpoint.every_n_train_steps", str(EVERY), "--ckpt_path", "last"]
        self.command = [program, *arguments(root, source, STEPS, *every)]

    @property
    def events(self) -> int:
        """The number of events of the last start."""
        return len(self.seen.read_text().splitlines())

    def state(self) -> dict[str, Any]:
        """Return the tensors of the last checkpoint."""
        return final_state(self.root, STEPS)

    def start(self, number: int) -> int:
        """Start the program, kill it before event `number` (0: never), and return its exit status."""
        command = [sys.executable, "-m", __spec__.name, "--child", str(number), str(self.root), *self.command]
        with self.log.open("wb") as log:
            return subprocess.run(command, stdout=log, stderr=log, timeout=600, cwd=RECIPES.parent).returncode

    def killed(self, rng: random.Random, events: int, times: int) -> list[str]:
        """Kill the run up to `times` times, until it finishes before its kill, and return the events."""
        places = []
        for _ in range(times):
            status = self.start(rng.randint(1, events))
            if status == 0:
                break
            assert status == -signal.SIGKILL, self.log.read_text()
            places.append(self.seen.read_text().splitlines()[-1])
        return places


def child(number: int, root: str, program: str, words: list[str]) -> None:
    """Run a program that kills itself just before event `number` in `root`, and writes down its events."""
    seen = os.open(f"{root}.events", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    count, last = 0, ""

    def hook(event: str, values: tuple[Any, ...]) -> None:
        nonlocal count, last
        writes = event == "open" and isinstance(values[2], int) and values[2] & (os.O_WRONLY | os.O_RDWR)
        if not writes and event not in EVENTS:
            return
        line = f"{event} {values[0]}"
        if f"{root}/" not in line or line == last:  # TensorBoard opens its file again for each record
            return
        count, last = count + 1, line
        os.write(seen, line.replace(root, "").encode() + b"\n")
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    sys.argv = [str(RECIPES / program), *words]
    sys.path.insert(0, str(RECIPES))
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(int(sys.argv[2]), sys.argv[3], sys.argv[4], sys.argv[5:])
    else:
        sys.exit(main())
