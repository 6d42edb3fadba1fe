"""On a machine with a GPU only tests/gpu sees it: all programs under test would take it, with several ranks at once."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.gates import asks_for_gpu
from tests.python import COLD

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("paths", "wanted"),
    [
        (["tests/gpu"], True),
        (["tests/gpu/"], True),
        (["tests/gpu/test_kernels.py::test_many_chunks"], True),
        ([str(ROOT / "tests" / "gpu"), "tests/gpu/test_kernels.py"], True),
        (["tests"], False),
        (["tests/gpu", "tests/optim"], False),
        (["tests/gpu_like"], False),
        ([], False),
    ],
)
def test_who_sees_it(paths: list[str], wanted: bool) -> None:
    assert asks_for_gpu(paths, ROOT) is wanted


@pytest.mark.slow
@pytest.mark.parametrize(("path", "seen"), [("tests/gpu", "7"), ("tests/package/test_gpu_hidden.py", "")])
def test_the_variable(path: str, seen: str, tmp_path: Path) -> None:
    report = "import os; pytest_collection_finish = lambda: print('seen', repr(os.environ['CUDA_VISIBLE_DEVICES']))"
    (tmp_path / "report_devices.py").write_text(report)
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "7", "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [COLD, "-m", "pytest", "-p", "report_devices", "--collect-only", "-q", "-s", path]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)
    assert f"seen {seen!r}" in done.stdout, done.stdout + done.stderr
