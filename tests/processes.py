"""Waiting in tests: for a condition, and for the end of processes that are not children of the test."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path


def wait_until(ready: Callable[[], bool], what: str, timeout: float = 180) -> None:
    """Return as soon as `ready` returns True, or raise TimeoutError with the text `what`."""
    deadline = time.monotonic() + timeout
    while not ready():
        if time.monotonic() > deadline:
            raise TimeoutError(what)
        time.sleep(0.02)


def alive(pid: int) -> bool:
    """Return whether a process runs. A zombie, which has ended and waits for its parent, does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):  # the second if it ends between open and read
        return False
    return state not in ("Z", "X")


def wait_for_end(pids: Iterable[int], timeout: float = 30) -> None:
    """Wait until no process runs: a process still runs for a moment after kill(2) has returned."""
    pids = list(pids)
    wait_until(lambda: not any(map(alive, pids)), f"of {pids} a process still runs", timeout)
