"""Run pretrain.py and die by SIGKILL inside a chosen system call: python killed.py CALL PART NUMBER ARGUMENTS...

CALL is one of the functions of `os` that end a file's writing (fsync, replace, link, unlink). The process is killed
just before its NUMBERth call for a file whose path contains PART. Otherwise it runs as `python pretrain.py
ARGUMENTS...`.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
from pathlib import Path
from typing import Any

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


def main() -> None:
    call, part, number = sys.argv[1], sys.argv[2], int(sys.argv[3])
    real, seen = getattr(os, call), 0

    def dies(target: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal seen
        path = os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else str(target)
        seen += part in path and not os.path.isdir(path)
        if seen == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(target, *args, **kwargs)

    setattr(os, call, dies)
    sys.argv = [str(RECIPES / "pretrain.py"), *sys.argv[4:]]
    sys.path.insert(0, str(RECIPES))
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
