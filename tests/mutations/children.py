"""Run pytest in forked children of a process that has imported the slow libraries, and nothing that is under test."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

TIMED_OUT = -1000  # a status that no process has
_ELSEWHERE = 97  # exit status of a child that would import another checkout's package
_SLOW_IMPORTS = (
    "torch",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "numpy",
    "lightning.pytorch",
    "accelerate",
    "transformers.trainer",
    "transformers.models.llama.modeling_llama",
    "hypothesis",
    "pytest",
)
_OWN = ("tests", "am_lightning")  # packages that a child imports from its copy


def preload() -> None:
    """Import what the tests need and do not change; skip what is not installed."""
    for name in _SLOW_IMPORTS:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    if any(name.partition(".")[0] == "am_lightning" for name in sys.modules):
        raise RuntimeError("am_lightning is imported in the parent, so that the children would not see the faults")


@dataclass
class Child:
    """A run of pytest over some tests in one copy.

    Attributes:
        pid: id of the process, which leads its own group.
        log: path of its output.
        started: ``time.monotonic()`` at its start.
        timeout: time limit in seconds.
        status: its exit status, ``TIMED_OUT``, or minus the signal that ended it; None while it runs.
    """

    pid: int
    log: Path
    started: float
    timeout: float
    status: int | None = None

    def poll(self) -> bool:
        """Return whether the run has ended. When its time is over, it is killed with all that it has started."""
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
                self._kill_group()  # processes that a test has left behind
            elif time.monotonic() - self.started > self.timeout:
                self.stop()
        return self.status is not None

    def stop(self) -> None:
        """Kill the run now."""
        if self.status is None:
            self._kill_group()
            os.waitpid(self.pid, 0)
            self.status = TIMED_OUT

    def _kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)

    @property
    def failures(self) -> list[str]:
        """Return ``node id - reason`` of the failed tests."""
        lines = self.log.read_text(errors="replace").splitlines()
        marks = ("FAILED ", "ERROR ")
        return [line.partition(" ")[2] for line in lines if line.startswith(marks) and "::" in line]


def start(tests: Sequence[str], copy: Path, log: Path, *, timeout: float, stop_at_first: bool = True) -> Child:
    """Fork a process that runs pytest over ``tests`` in ``copy``."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        _run(tests, copy, log, stop_at_first)
    return Child(pid, log, time.monotonic(), timeout)


def _run(tests: Sequence[str], copy: Path, log: Path, stop_at_first: bool) -> None:
    """Run in the child; this never returns."""
    status = 3  # pytest's status of an internal error
    try:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _redirect(log)
        _import_from(copy)
        found = importlib.util.find_spec("am_lightning")
        if found is None or not str(found.origin).startswith(f"{copy}{os.sep}"):
            print(f"am_lightning would come from {found and found.origin}, not from {copy}")
            status = _ELSEWHERE
        else:
            import pytest

            first = ["-x"] if stop_at_first else []
            status = int(pytest.main([*first, "-q", "-p", "no:cacheprovider", *tests]))
    except BaseException as error:  # the child must not continue as the parent, whatever happens
        print(f"{type(error).__name__}: {error}")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _redirect(log: Path) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(source, target)


def _import_from(copy: Path) -> None:
    """Import the checkout's packages from ``copy``, here and in processes that tests start.

    No bytecode is written: that of a fault could pass for the restored file's, with the same size and second.
    """
    os.chdir(copy)
    root = Path(__file__).resolve().parents[2]
    sys.path[:] = [str(copy), *(path for path in sys.path if Path(path).resolve() != root)]
    for name in [name for name in sys.modules if name.partition(".")[0] in _OWN]:
        del sys.modules[name]
    importlib.invalidate_caches()
    sys.dont_write_bytecode = True
    os.environ.update(PYTHONPATH=str(copy), PYTHONDONTWRITEBYTECODE="1", COLUMNS="240")
