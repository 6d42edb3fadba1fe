"""Signals that ask a program to stop: obeyed at the end of a step while it trains, at once everywhere else.

Python runs a signal's handler in the main thread, between two bytecodes: not while that thread waits for other ranks in
C++, which may take half an hour in a rendezvous. So the handler only notes the signal, for the end of a step; and a
thread, which the interpreter tells of every signal as it arrives, ends the process where it is to end at once.
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

# Where ranks received different ones the later in this list wins: a requeue is not undone by the SIGTERM that the
# scheduler sends next.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))
# A launcher forwards what the terminal, a process group or srun has delivered already: one signal, received twice.
SAME_SIGNAL_S: dict[int, float] = {signal.SIGINT: 1.0, signal.SIGTERM: 5.0}
OUTSIDE = "outside training: there was nothing to save"
AGAIN = f"again, at once; {RESUME}"

_current: StopSignals | None = None  # who is told
_early: StopSignals | None = None  # of command_line()
_channel: tuple[int, socket.socket] | None = None  # the process whose thread reads it; where the interpreter writes


def end_process(number: int, why: str = "") -> NoReturn:
    """End the process now, from any thread, with status 128 + the signal's number (the shell's convention)."""
    with contextlib.suppress(OSError):  # nobody reads stderr any more, such as a launcher that was killed
        os.write(2, f"stopped by {' '.join((signal.Signals(number).name, why)).strip()}\n".encode())
    os._exit(128 + number)


class StopSignals:
    """SIGINT (Ctrl-C), SIGTERM and (where the system has it) SIGUSR1, from `take` to `give_back`.

    Args:
        end: ends the process, given the signal's number and why, in a few words; where it returns, the signal stays
            noted. Called in a thread.
        tell: called in a thread with the number of a signal that came for the first time while it is obeyed later.

    Attributes:
        received: the numbers of those that have come.
        later: whether a training loop obeys them at the end of a step. There only a second one, which comes later than
            `SAME_SIGNAL_S`, ends the process at once; where False, the first one does.
    """

    def __init__(
        self, end: Callable[[int, str], None] = end_process, tell: Callable[[int], None] = lambda number: None
    ) -> None:
        self.received: set[int] = set()
        self.later = False
        self._end, self._tell = end, tell
        self._since: dict[int, float] = {}  # signal -> time.monotonic() of its first arrival
        self._process = 0  # whose signals these are
        self._before: tuple[StopSignals | None, dict[int, Any], int] = (None, {}, -1)

    def take(self) -> bool:
        """From now on; also a SIGUSR1 from before. Whether that is possible: only in the main thread."""
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
        """The handlers are those of before; nothing has been received."""
        global _current
        if self._process == os.getpid():
            _current, handlers, descriptor = self._before
            signal.set_wakeup_fd(descriptor)
            for number, handler in handlers.items():
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._process = 0
        self.forget()

    def forget(self) -> None:
        """Nothing has been received."""
        self.received.clear()
        self._since.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        """The handler: nothing else is safe in it, because this rank may be inside a collective."""
        if os.getpid() == self._process:
            self.received.add(number)
        elif number == signal.SIGTERM:  # forked from it, a DataLoader's worker: it ends with its rank
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def hear(self, number: int) -> None:
        """What the thread does with a signal as it arrives."""
        now = time.monotonic()
        first = self._since.setdefault(number, now)
        if not self.later:
            self._end(number, OUTSIDE)
        elif now - first > SAME_SIGNAL_S.get(number, math.inf):
            self._end(number, AGAIN)
        elif now == first:
            self._tell(number)

    def leave(self, step: int) -> NoReturn:
        """End the process as a signal ends one (SIGTERM where another rank got it), after `step` was saved."""
        number = max(self.received, key=SIGNALS.index, default=signal.SIGTERM)
        print(f"stopped by {signal.Signals(number).name} after step {step}, which is saved; {RESUME}", file=sys.stderr)
        sys.exit(128 + number)


@contextlib.contextmanager
def early_signals() -> Iterator[None]:
    """In the block a signal ends the process, with a line; SIGUSR1 is kept for whoever takes the signals next, because
    only a run that has read its configuration knows whether its job is to be requeued."""
    global _early
    keeps = getattr(signal, "SIGUSR1", None)
    outer, _early = _early, StopSignals(lambda number, why: None if number == keeps else end_process(number))
    early = _early
    try:
        early.take()
        yield
    finally:
        _early = outer
        if _current is None or not _current.later:  # a process that is leaving takes no second signal for a fresh one
            early.give_back()


def _channel_of_this_process() -> int:
    global _channel
    if _channel is None or _channel[0] != os.getpid():
        ours, theirs = socket.socketpair()  # a pipe cannot be set to non-blocking on every system
        theirs.setblocking(False)
        _channel = (os.getpid(), theirs)
        threading.Thread(target=_hear_all, args=(ours,), name="stop signals", daemon=True).start()
    return _channel[1].fileno()


def _hear_all(channel: socket.socket) -> None:
    while numbers := channel.recv(64):
        for number in numbers:
            if number in SIGNALS and _current is not None:
                _current.hear(number)


def _silence_child() -> None:
    """A forked process has the descriptor, too, and its signals would be taken for its parent's."""
    if _channel is not None:
        signal.set_wakeup_fd(-1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_silence_child)
