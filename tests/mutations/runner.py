"""Plant one fault after the other in copies of the checkout, and run the tests that must detect it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.mutations.children import TIMED_OUT, Child, start
from tests.mutations.copies import Planted, copy_checkout
from tests.mutations.mutation import Mutation

SEEN, NOT_SEEN, STALE, ERROR = "seen", "NOT SEEN", "STALE", "ERROR"
FAULT_TIMEOUT, CHECK_TIMEOUT = 300.0, 3600.0  # seconds for one fault, and for all tests without a fault
_POLL = 0.05


@dataclass(frozen=True)
class Result:
    """The result of a fault.

    Attributes:
        verdict: ``SEEN``, ``NOT_SEEN``, ``STALE`` (it does not apply to the file any more) or ``ERROR`` (pytest could
            not run the tests, for instance because an import failed).
        seconds: time from planting to the end of pytest.
        by: the failed test and its reason, "timed out", or the error.
    """

    area: str
    mutation: Mutation
    verdict: str
    seconds: float
    by: str

    @property
    def good(self) -> bool:
        return self.verdict == SEEN


@dataclass
class _Worker:
    """A copy of the checkout, and the fault in it."""

    copy: Path
    area: str = ""
    mutation: Mutation | None = None
    planted: Planted | None = None
    child: Child | None = None


class Runner:
    """Try faults in copies of the checkout below ``folder``, ``jobs`` at a time."""

    def __init__(self, folder: Path, jobs: int) -> None:
        self.folder = folder
        self._workers = [_Worker(copy_checkout(folder / f"copy{number}")) for number in range(jobs)]
        self._logs = 0

    def check(self, tests: Sequence[str]) -> list[str]:
        """Return the tests that fail without any fault, or pytest's output if it could not run them."""
        child = start(tests, self._workers[0].copy, self._log(), timeout=CHECK_TIMEOUT, stop_at_first=False)
        try:
            while not child.poll():
                time.sleep(_POLL)
        finally:
            child.stop()
        if child.status == 0:
            return []
        return child.failures or [f"pytest ended with status {child.status}", *_tail(child.log)]

    def run(self, chosen: Sequence[tuple[str, Mutation]], tell: Callable[[Result], None]) -> list[Result]:
        """Try every fault; call ``tell`` with each result."""
        waiting, results = deque(chosen), []
        try:
            while waiting or any(worker.child for worker in self._workers):
                for worker in self._workers:
                    result = self._advance(worker, waiting)
                    if result is not None:
                        results.append(result)
                        tell(result)
                time.sleep(_POLL)
        finally:
            for worker in self._workers:
                if worker.child is not None:
                    worker.child.stop()
        return results

    def _advance(self, worker: _Worker, waiting: deque[tuple[str, Mutation]]) -> Result | None:
        """Give an idle worker a fault, or take the result of a finished one."""
        if worker.child is None and waiting:
            worker.area, worker.mutation = waiting.popleft()
            worker.planted = Planted(worker.copy, worker.mutation)
            if not worker.planted.plant():
                return Result(worker.area, worker.mutation, STALE, 0.0, f"not once in {worker.mutation.file}")
            worker.child = start(worker.mutation.tests, worker.copy, self._log(), timeout=FAULT_TIMEOUT)
        elif worker.child is not None and worker.child.poll():
            child, worker.child = worker.child, None
            assert worker.mutation is not None and worker.planted is not None
            worker.planted.remove()
            verdict, by = _verdict(child)
            return Result(worker.area, worker.mutation, verdict, time.monotonic() - child.started, by)
        return None

    def _log(self) -> Path:
        self._logs += 1
        return self.folder / f"log{self._logs}.txt"


def _verdict(child: Child) -> tuple[str, str]:
    """Return the verdict: only failed tests and time-outs count as seen."""
    if child.status == 0:
        return NOT_SEEN, ""
    if child.status == TIMED_OUT:
        return SEEN, f"timed out after {child.timeout:g} s"
    if child.status == 1 and child.failures:
        return SEEN, child.failures[0]
    return ERROR, f"pytest ended with status {child.status}: {' / '.join(_tail(child.log))}"


def _tail(log: Path) -> list[str]:
    return log.read_text(errors="replace").splitlines()[-12:]
