"""Signals that ask a program to stop: it stops at the end of a step while it trains, and at once at any other time.

Python runs a signal's handler in the main thread between two bytecodes, so it does not run while that thread waits in
C++ for other ranks, which may take half an hour in a rendezvous. Therefore the handler only notes the signal for the
end of a step, and a thread, to which the interpreter writes every signal as it arrives, ends the process if it is to
end at once.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn

from am_lightning.pretrain.runtime.errors import RESUME

# If ranks received different signals, the later one in this list wins: the SIGTERM that a scheduler sends after SIGUSR1
# must not undo the requeue.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))
# A launcher forwards a signal that the terminal, the process group or srun has delivered already: it arrives twice.
SAME_SIGNAL_S: dict[int, float] = {signal.SIGINT: 1.0, signal.SIGTERM: 5.0}

_current: StopSignals | None = None  # receives the signals
_early: StopSignals | None = None  # the one of early_signals()
_channel: tuple[int, socket.socket] | None = None  # id of the process whose thread reads it, and the socket to write to


def end_process(number: int, why: str = "") -> NoReturn:
    """End the process now, from any thread, with status 128 + the signal's number (the shell's convention)."""
    with contextlib.suppress(OSError):  # stderr may be closed, if the launcher was killed
        os.write(2, f"stopped by {' '.join((signal.Signals(number).name, why)).strip()}\n".encode())
    os._exit(128 + number)


class Stopped(SystemExit):
    """A signal has stopped training on all ranks, after a checkpoint; `code` is the process's exit status."""


class StopSignals:
    """Receives SIGINT (Ctrl-C), SIGTERM and, if the system has it, SIGUSR1, from `take` to `give_back`.

    Args:
        end: ends the process, given the signal's number and a short reason; if it returns, the signal stays noted.
            Called in a thread.
        tell: called in a thread with the number of a signal that arrives for the first time while `later` is True.

    Attributes:
        received: the numbers of the signals that have arrived.
        later: True while a training loop handles signals at the end of a step: then only a second signal that arrives
            more than `SAME_SIGNAL_S` after the first ends the process at once. Otherwise the first one does.
    """

    def __init__(
        self, end: Callable[[int, str], None] = end_process, tell: Callable[[int], None] = lambda number: None
    ) -> None:
        self.received: set[int] = set()
        self.later = False
        self._end, self._tell = end, tell
        self._since: dict[int, float] = {}  # signal -> time.monotonic() of its first arrival
        self._process = 0  # the process that receives them
        self._before: tuple[StopSignals | None, dict[int, Any], int] = (None, {}, -1)

    def take(self) -> bool:
        """Receive the signals from now on, and an earlier SIGUSR1. Return False outside the main thread."""
        global _current
        if threading.current_thread() is not threading.main_thread():
            return False
        if self._process == os.getpid():
            return True
        self._process = os.getpid()
        before, _current = _current, self
        handlers = {number: signal.signal(number, self._note) for number in SIGNALS}
        self._before = (before, handlers, signal.set_wakeup_fd(_channel_of_this_process(), warn_on_full_buffer=False))
        if _early is not None and _early is not self:
            kept, _early.received = _early.received, set()
            for number in kept:
                self._note(number, None)
                self.hear(number)
        return True

    def give_back(self) -> None:
        """Restore the handlers and forget what was received."""
        global _current
        if self._process == os.getpid():
            _current, handlers, descriptor = self._before
            signal.set_wakeup_fd(descriptor)
            for number, handler in handlers.items():
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._process = 0
        self.forget()

    def forget(self) -> None:
        """Forget what was received."""
        self.received.clear()
        self._since.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        """Note a signal. The handler can do nothing else, because this rank may be inside a collective."""
        if os.getpid() == self._process:
            self.received.add(number)
        elif number == signal.SIGTERM:  # in a forked process, such as a DataLoader's worker
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def hear(self, number: int) -> None:
        """Handle a signal in the thread, as it arrives."""
        now = time.monotonic()
        first = self._since.setdefault(number, now)
        if not self.later:
            self._end(number, "outside training: there was nothing to save")
        elif now - first > SAME_SIGNAL_S.get(number, math.inf):
            self._end(number, f"again, at once; {RESUME}")
        elif now == first:
            self._tell(number)

    def leave(self, step: int) -> NoReturn:
        """Raise `Stopped` after `step` was saved, with SIGTERM's status if only another rank received a signal."""
        number = max(self.received, key=SIGNALS.index, default=signal.SIGTERM)
        print(f"stopped by {signal.Signals(number).name} after step {step}, which is saved; {RESUME}", file=sys.stderr)
        raise Stopped(128 + number)


@contextlib.contextmanager
def early_signals() -> Iterator[None]:
    """End the process with a message if a signal arrives in the block.

    SIGUSR1 is kept for the next `take`, because only a run that has read its configuration knows whether to requeue.
    """
    global _early
    keeps = getattr(signal, "SIGUSR1", None)
    outer, _early = _early, StopSignals(lambda number, why: None if number == keeps else end_process(number))
    early = _early
    try:
        early.take()
        yield
    finally:
        _early = outer
        if _current is None or not _current.later:  # while the process stops, more signals change nothing
            early.give_back()


def _channel_of_this_process() -> int:
    global _channel
    if _channel is None or _channel[0] != os.getpid():
        ours, theirs = socket.socketpair()  # not every system can make a pipe non-blocking
        theirs.setblocking(False)
        _channel = (os.getpid(), theirs)
        threading.Thread(target=_hear_all, args=(ours,), name="stop signals", daemon=True).start()
    return _channel[1].fileno()


def _hear_all(channel: socket.socket) -> None:
    while numbers := channel.recv(64):
        for number in numbers:
            if number in SIGNALS and _current is not None:
                _current.hear(number)


if hasattr(os, "register_at_fork"):  # a forked process inherits the descriptor, and would write its signals to it
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1) if _channel else None)
