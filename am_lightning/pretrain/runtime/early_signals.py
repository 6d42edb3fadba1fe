"""SIGUSR1 in a program's first seconds, whose default ends the process: kept for whoever will handle it."""

from __future__ import annotations

import signal
import threading
from types import FrameType

SAME_INTERRUPT_S = 1.0  # a terminal sends one to every process of a job, and a launcher may pass it on

_kept: list[int] = []


def keep_signals() -> None:
    """From now on SIGUSR1 (where the system has it) is noted, until another handler takes its place."""
    if hasattr(signal, "SIGUSR1") and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGUSR1, _keep)


def kept_signals() -> list[int]:
    """The numbers of the signals that came since the last call, each once."""
    taken = sorted(set(_kept))
    _kept.clear()
    return taken


def _keep(number: int, frame: FrameType | None) -> None:
    _kept.append(number)
