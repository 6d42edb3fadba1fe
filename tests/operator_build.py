"""The folder in which DeepSpeed's CPU operator is built, once for all tests.

All tests and their programs have these variables: a ninja of another version would build it again, and a build that
is killed leaves a lock on which every later start waits without a message.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from pathlib import Path

FOLDER = Path(sys.prefix) / "torch_extensions"  # not the user's: another environment's build may hold its lock


def variables() -> dict[str, str]:
    """Return what a program's environment needs besides the test's own."""
    scripts = sysconfig.get_path("scripts")  # ninja is beside python
    return {
        "DS_ACCELERATOR": "cpu",
        "TORCH_EXTENSIONS_DIR": str(FOLDER),
        "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",
    }
