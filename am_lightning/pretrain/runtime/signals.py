"""A signal that asks a program to stop: noted in the handler, obeyed where the program can be left."""

from __future__ import annotations

import signal
import sys
import time
from types import FrameType
from typing import NoReturn

from am_lightning.pretrain.runtime.early_signals import SAME_INTERRUPT_S, kept_signals
from am_lightning.pretrain.runtime.main import RESUME


class StopSignal:
    """Notes SIGINT (Ctrl-C), SIGTERM (and SIGUSR1, where the system has it) from now on; an earlier SIGUSR1, too.

    Attributes:
        received: the signal's number, or None.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._since = 0.0
        signal.signal(signal.SIGTERM, self._note)
        signal.signal(signal.SIGINT, self._note)
        if hasattr(signal, "SIGUSR1"):
            signal.signal(signal.SIGUSR1, self._note)
        for number in kept_signals():
            self._note(number, None)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == self.received == signal.SIGINT and time.monotonic() - self._since > SAME_INTERRUPT_S:
            raise KeyboardInterrupt  # Ctrl-C again: at once
        if self.received is None:
            self._since = time.monotonic()
        self.received = number

    def leave(self, step: int) -> NoReturn:
        """End the process as a signal ends one: status 128 + its number (SIGTERM where another rank got it)."""
        number = self.received or signal.SIGTERM
        print(f"stopped by {signal.Signals(number).name} after step {step}, which is saved; {RESUME}", file=sys.stderr)
        sys.exit(128 + number)
