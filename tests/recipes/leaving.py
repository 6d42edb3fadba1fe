"""The end of a process whose FSDP2 ran over gloo."""

from __future__ import annotations

import atexit
import os
import sys
from typing import NoReturn


def leave() -> NoReturn:
    """End this finished process without the interpreter's last steps.

    In these steps torch 2.13 aborts about one process in ten that has used fully_shard over gloo ("terminate called
    without an active exception"; a few lines of torch alone do it), and the launcher takes the run for a failed one.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
