"""Faults of one rank under torchrun: killed, stopped, slow; a DataLoader's worker killed or stopped.

    python -m tests.recipes.cluster.faults [KIND ...]

On one machine, launch/torchrun.sh starts two processes of each program: the laptop recipe with a tiny model,
fault_tolerance.hang_timeout_s 15, data.loader_timeout_s 10. It prints for each kind how the launcher ended, after how
long, and the first line of the error, and exits with 1 if a run neither finished nor ended with an error.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.processes import wait_until
from tests.recipes.commands import RECIPES

from .endings import PROGRAMS
from .fault_injection import corpus
from .runs import LAUNCH, options, processes_of, variables

KINDS = ("killed", "stopped", "slow", "worker killed", "worker stopped")
FOREVER = 100_000  # steps
HANG_S = 15
LOADER_S = 10


class Launcher:
    """torchrun.sh with two processes on this machine."""

    def __init__(self, root: Path, source: Path, program: str, steps: int, *more: str) -> None:
        self.root, self.program = root, RECIPES / program
        self.log = root.with_name(f"{root.name}.log")
        args = [*options(source, steps, 5), "--fault_tolerance.hang_timeout_s", str(HANG_S), *more]
        env = variables(root, NODES="1", GPUS_PER_NODE="2", PROGRAM=str(self.program), MAX_RESTARTS="0")
        with self.log.open("wb") as file:
            self.process = subprocess.Popen(
                [str(LAUNCH / "torchrun.sh"), *args], env=env, stdout=file, stderr=file, start_new_session=True
            )

    def checkpoints(self) -> int:
        found = (re.findall(r"\d+", path.name) for path in (self.root / "checkpoints").glob("*[0-9]*"))
        return max((int(number) for numbers in found for number in numbers[:1]), default=0)

    def ranks(self) -> list[int]:
        """Return the ranks without the workers that they forked."""
        return [pid for pid in self._pids() if _parent(pid) not in self._pids()]

    def workers(self) -> list[int]:
        """Return the DataLoaders' workers, which are forked from ranks."""
        return [pid for pid in self._pids() if _parent(pid) in self._pids()]

    def _pids(self) -> list[int]:
        return processes_of(self.root, self.program)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        for pid in self._pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _parent(pid: int) -> int:
    with contextlib.suppress(OSError, ValueError):
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].split()[1])
    return 0


def meet(launcher: Launcher, kind: str) -> None:
    """Apply the fault to the last rank or worker."""
    wait_until(lambda: launcher.checkpoints() >= 5, "no checkpoint", 120)
    victims = launcher.workers() if kind.startswith("worker") else launcher.ranks()
    number = signal.SIGKILL if "killed" in kind else signal.SIGSTOP
    os.kill(victims[-1], number)
    if kind == "slow":
        for _ in range(2):
            time.sleep(3)
            os.kill(victims[-1], signal.SIGCONT)
            time.sleep(0.5)
            os.kill(victims[-1], signal.SIGSTOP)
        os.kill(victims[-1], signal.SIGCONT)


def run(folder: Path, source: Path, program: str, kind: str, patience: float = 120) -> tuple[int | None, float, str]:
    """Return (exit status, or None if it did not end; seconds from the fault to the end; output)."""
    more = ["--data.num_workers", "1", "--data.loader_timeout_s", str(LOADER_S)] if kind.startswith("worker") else []
    steps = 400 if kind == "slow" else FOREVER
    launcher = Launcher(folder / f"{program}-{kind.replace(' ', '-')}", source, program, steps, *more)
    try:
        meet(launcher, kind)
        began = time.monotonic()
        with contextlib.suppress(subprocess.TimeoutExpired):
            launcher.process.wait(patience)
        return launcher.process.poll(), time.monotonic() - began, launcher.log.read_text(errors="replace")
    finally:
        launcher.kill()


def last_words(said: str) -> str:
    lines = [line for line in said.splitlines() if re.match(r"(\[rank\d\]: )?(\w+\.)*\w*(Error|error)\b", line)]
    return lines[0][:160] if lines else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", default=KINDS)
    parser.add_argument("--programs", nargs="+", default=PROGRAMS, choices=PROGRAMS)
    args = parser.parse_args()
    failed = 0
    with tempfile.TemporaryDirectory(prefix="am-faults-") as made:
        source = corpus(Path(made))
        for kind in args.kinds:
            for program in args.programs:
                status, seconds, said = run(Path(made), source, program, kind)
                held = status == 0 if kind == "slow" else status not in (0, None)
                failed += not held
                ended = "did not end" if status is None else f"status {status} after {seconds:.0f} s"
                print(f"| {kind} | {program} | {ended} | {last_words(said)} |", flush=True)
                if not held:
                    print(said[-3000:], flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
