"""A port for processes that find each other on this machine."""

from __future__ import annotations

import os
import re
import socket
from itertools import count

# Below the ephemeral ports. Each worker of pytest-xdist has a range of its own, so that no other takes a port between
# its choice and its use.
_FIRST, _PER_WORKER = 20000, 500
_numbers = count(os.getpid() * 7)


def free_port() -> int:
    """Return a TCP port that nothing listens on now. If a launcher can choose one itself, let it."""
    worker = int(re.sub(r"\D", "", os.environ.get("PYTEST_XDIST_WORKER", "")) or 0)
    for _ in range(_PER_WORKER):
        port = _FIRST + worker * _PER_WORKER + next(_numbers) % _PER_WORKER
        with socket.socket() as free:
            try:
                free.bind(("", port))
            except OSError:
                continue
            return port
    raise OSError(f"no port is free from {_FIRST + worker * _PER_WORKER} on")
