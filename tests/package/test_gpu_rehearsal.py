"""tests/gpu is rehearsed on the CPU, so that a typing error there is found without a GPU."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.gates import DEVICE_VARIABLE, GPU_TESTS
from tests.python import COLD

ROOT = Path(__file__).resolve().parents[2]
NIGHTLY = pytest.mark.nightly("rehearsals of tests/gpu")
FILES = sorted(path.name for path in GPU_TESTS.glob("test_*.py"))


def rehearse(*arguments: str) -> str:
    """Return the end of pytest's output; all tests must have passed or been skipped."""
    command = [COLD, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    env = os.environ | {DEVICE_VARIABLE: "cpu"}  # with this session's fork server
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return done.stdout.splitlines()[-1]


def passed(said: str) -> int:
    found = re.search(r"(\d+) passed", said)
    return int(found[1]) if found else 0


@NIGHTLY
@pytest.mark.sample
def test_some() -> None:
    """Two files that take seconds are rehearsed."""
    assert passed(rehearse("tests/gpu/test_kernels.py", "tests/gpu/test_capture.py", "-k", "clipping or replays")) > 15


@NIGHTLY
@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_a_file(name: str) -> None:
    said = rehearse(f"tests/gpu/{name}")
    assert passed(said) or "skipped" in said


@pytest.mark.slow
def test_without_a_gpu_all_is_skipped_at_once() -> None:
    """No framework is imported to find this out."""
    env = {key: value for key, value in os.environ.items() if key != DEVICE_VARIABLE} | {"CUDA_VISIBLE_DEVICES": ""}
    code = (
        "import sys, pytest; status = pytest.main(['-q', '-p', 'no:cacheprovider', 'tests/gpu']); "
        "print('imported', sorted({'lightning', 'transformers', 'accelerate', 'deepspeed'} & sys.modules.keys())); "
        "sys.exit(status)"
    )
    done = subprocess.run([COLD, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "imported []" in done.stdout and " passed" not in done.stdout, done.stdout[-3000:]
