"""Fault injection: kill runs over two nodes at random moments; each must end with the bits of an unbroken run.

    python -m tests.recipes.cluster.fault_injection --kills 20 --seed 0

It needs root, iproute2 and, for SIGUSR1, slurm-wlm and munge. Every run trains the laptop recipe with a tiny model over
two nodes (network namespaces with a torchrun agent each, or two nodes of a SLURM) and is hit several times, by a kind
and at a moment that the seed draws. It prints a table and exits with 1 if a run did not end or differs from the
unbroken one in a bit.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.processes import wait_until

from . import kills, namespaces, slurm
from .runs import LAUNCH, Agents, changed, newest_step, options

STEPS, EVERY = 240, 10
KILLS_PER_RUN = 4
LATEST = 0.8  # share of the steps after which nothing is killed, because the run might end first
EARLY = 0.15  # share of the kills that come while the processes still start
RUN_TIMEOUT = 1500.0  # seconds


@dataclass
class Row:
    """A kill of a run, or its result."""

    run: int
    launcher: str
    kind: str
    step: int
    detail: str

    def __str__(self) -> str:
        return f"| {self.run} | {self.launcher} | {self.kind} | {self.step} | {self.detail} |"


HEADER = (
    "| run | launcher | kill | newest checkpoint then (step) | what was done, and came of it |\n|---|---|---|---|---|"
)


def unbroken(root: Path, args: list[str]) -> None:
    """Train on two nodes without faults."""
    with namespaces.two_nodes() as nodes:
        agents = Agents(nodes, root, args)
        if agents.end(RUN_TIMEOUT) != [0, 0]:
            raise RuntimeError(f"the unbroken run failed:\n{agents.tail()}")


def corpus(folder: Path) -> Path:
    """Write some text, the same every time."""
    rng = random.Random(0)
    words = ["def", "return", "memory", "momentum", "step", "=", "(x)", ":", "\n", "for", "in", "range"]
    for number in range(120):
        file = folder / "corpus" / f"{number:03d}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(" ".join(rng.choices(words, k=300)))
    return folder / "corpus"


def plan(number: int, rng: random.Random, with_slurm: bool) -> list[list[str]]:
    """Draw the kinds of kills of each run, all equally often. SLURM's signal has separate runs."""
    kinds = [*kills.KINDS, *(["SIGUSR1"] if with_slurm else [])]
    drawn = [kinds[i % len(kinds)] for i in range(number)]
    under_slurm = [kind for kind in drawn if kind == "SIGUSR1"]
    others = [kind for kind in drawn if kind != "SIGUSR1"]
    rng.shuffle(others)
    return [part[i : i + KILLS_PER_RUN] for part in (others, under_slurm) for i in range(0, len(part), KILLS_PER_RUN)]


def moments(count: int, rng: random.Random, steps: int) -> list[int]:
    """Draw the step whose checkpoint each kill waits for, one in each equal part of the run."""
    part = steps * LATEST / count
    return [0 if rng.random() < EARLY else int(part * (i + rng.random())) for i in range(count)]


class FaultInjection:
    """Runs in one folder, compared with an unbroken one.

    Args:
        folder: folder of the runs.
        args: arguments of pretrain.py; `steps` of them are optimizer steps.
        reference: folder of the unbroken run.
        pause: largest number of seconds between a checkpoint and the kill that waits for it.

    Attributes:
        failures: runs that did not end, or differ.
    """

    def __init__(
        self, folder: Path, args: list[str], steps: int, reference: Path, rng: random.Random, pause: float = 3.0
    ) -> None:
        self.folder, self.args, self.steps, self.reference = folder, args, steps, reference
        self.rng, self.pause = rng, pause
        self.failures = 0

    def say(self, row: Row) -> None:
        print(row, flush=True)

    def wait_for_moment(self, root: Path, step: int) -> None:
        """Wait until the checkpoint at `step` exists (0: no wait), and a random time more."""
        wait_until(lambda: newest_step(root) >= step, f"{root} does not reach step {step}", timeout=600)
        time.sleep(self.rng.uniform(0, self.pause))

    def torchrun(self, number: int, kinds: list[str]) -> None:
        """Run two torchrun agents on a small disk and hit them with `kinds`."""
        root = self.folder / f"run{number}"
        with kills.small_disk(root), namespaces.two_nodes() as nodes:
            began = time.monotonic()
            agents = Agents(nodes, root, self.args, MAX_RESTARTS="20")
            for kind, step in zip(kinds, moments(len(kinds), self.rng, self.steps), strict=True):
                self.wait_for_moment(root, step)
                at = newest_step(root)
                self.say(Row(number, "torchrun", kind, at, kills.KINDS[kind](agents, self.rng)))
            agents.finish(self.steps, RUN_TIMEOUT)
            self._result(number, "torchrun", root, f"{agents.starts} starts of agents", began)

    def slurm(self, cluster: slurm.Slurm, number: int, count: int) -> None:
        """Run a job on two SLURM nodes that gets SIGUSR1 `count` times."""
        root, began = self.folder / f"run{number}", time.monotonic()
        others = {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "SBATCH_ARGS": ""}
        job = cluster.submit([str(LAUNCH / "slurm.sh"), *self.args], root, **others)
        for restarts, step in enumerate(moments(count, self.rng, self.steps)):
            running = {"JobState": "RUNNING", "Restarts": str(restarts)}
            wait_until(lambda wanted=running: wanted.items() <= cluster.job(job).items(), "not started", timeout=300)
            self.wait_for_moment(root, step)
            at = newest_step(root)
            cluster.call("scancel", "--signal=USR1", job)
            self.say(Row(number, "SLURM", "SIGUSR1", at, "to all ranks"))
        state = cluster.wait(job, RUN_TIMEOUT)
        if state != "COMPLETED":
            raise RuntimeError(f"job {job} is {state}")
        self._result(number, "SLURM", root, f"{cluster.job(job)['Restarts']} requeues", began)

    def _result(self, number: int, launcher: str, root: Path, how: str, began: float) -> None:
        different = changed(root, self.reference)
        self.failures += bool(different)
        what = f"**differs**: {different[:3]}" if different else "bitwise equal"
        detail = f"{what}; {how}, {time.monotonic() - began:.0f} s"
        self.say(Row(number, launcher, "*end*", newest_step(root), detail))

    def run(self, number: int, kinds: list[str], cluster: slurm.Slurm | None) -> None:
        try:
            if "SIGUSR1" in kinds:
                assert cluster is not None
                self.slurm(cluster, number, len(kinds))
            else:
                self.torchrun(number, kinds)
        except (TimeoutError, RuntimeError) as error:
            self.failures += 1
            self.say(Row(number, "", "*end*", -1, f"**did not end**: {error}"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="for the runs; by default a temporary one")
    args = parser.parse_args()
    if reason := namespaces.missing():
        sys.exit(f"error: {reason}")
    no_slurm = slurm.missing()
    if no_slurm:
        print(f"without SIGUSR1 under SLURM: {no_slurm}")
    rng = random.Random(args.seed)
    with _folder(args.folder) as folder, contextlib.ExitStack() as stack:
        cluster = None if no_slurm else stack.enter_context(slurm.two_node_slurm())
        options_of_runs = options(corpus(folder), STEPS, EVERY)
        unbroken(folder / "unbroken", options_of_runs)
        injection = FaultInjection(folder, options_of_runs, STEPS, folder / "unbroken", rng)
        print(HEADER, flush=True)
        for number, kinds in enumerate(plan(args.kills, rng, cluster is not None), start=1):
            injection.run(number, kinds, cluster)
    print(f"\n{args.kills} kills, seed {args.seed}: {injection.failures} runs failed")
    return int(injection.failures > 0)


@contextlib.contextmanager
def _folder(given: Path | None) -> Iterator[Path]:
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        yield given.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="am-injection-") as made:
        yield Path(made)


if __name__ == "__main__":
    sys.exit(main())
