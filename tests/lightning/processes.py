"""Run a program under Lightning's own launcher, which starts the other ranks."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ports import free_port
from tests.python import PYTHON

ROOT = Path(__file__).resolve().parents[2]


def run_module(module: str, argument: Path, results: list[Path], *, threads: int, python: str = PYTHON) -> list[Any]:
    """Return what ``python -m module argument`` saved to ``results``.

    The exit code is not checked, because gloo sometimes aborts at exit, after the results have been written.
    """
    env = {k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "RANK", "WORLD_SIZE")}
    env |= {"MASTER_PORT": str(free_port()), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads)}
    command = [python, "-m", module, str(argument)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)
    if not all(result.exists() for result in results):
        pytest.fail(f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return [torch.load(result, weights_only=True) for result in results]
