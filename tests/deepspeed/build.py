"""Check whether DeepSpeed can run here, and build the operator by which its CPU processes communicate."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

from tests import operator_build
from tests.device import ON_GPU
from tests.ports import free_port
from tests.python import COLD


def refusal() -> str | None:
    """Return why DeepSpeed cannot run, or None if it can."""
    if find_spec("deepspeed") is None:
        return "deepspeed is not installed"
    if ON_GPU:
        return None
    if not shutil.which("g++") and not os.environ.get("CI"):
        return "DeepSpeed compiles a CPU operator at its first start, and there is no g++"
    if " " in sys.prefix:
        return f"torch's extension builder cannot link in a folder with a space: {sys.prefix}"
    return None


def build_operator() -> None:
    """Build the operator once, in one process; NCCL needs none.

    It takes minutes on a busy machine. A build that is killed leaves a lock on which every later start would wait
    without a message.
    """
    if ON_GPU:
        return
    os.environ.update(operator_build.variables())
    for lock in operator_build.FOLDER.glob("deepspeed_shm_comm/lock"):
        if time.time() - lock.stat().st_mtime > 900:
            lock.unlink()
    port = free_port()
    env = {**os.environ, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    code = "import tests.deepspeed.runs, deepspeed; deepspeed.init_distributed('gloo')"
    command = [COLD, "-c", code]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        command, cwd=root, env={**env, "MASTER_PORT": str(port)}, capture_output=True, text=True, timeout=1200
    )
    assert "built successfully" in done.stdout or done.returncode == 0, done.stderr[-3000:]
