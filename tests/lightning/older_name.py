"""Run this folder's tests with ``pytorch_lightning`` and ``lightning_fabric`` instead of ``lightning``."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

from tests.python import PYTHON

ROOT = Path(__file__).resolve().parents[2]
_OLDER = {"lightning.pytorch": "pytorch_lightning", "lightning.fabric": "lightning_fabric"}
_NAME = re.compile(rf"(?<![\w.])({'|'.join(map(re.escape, _OLDER))})\b")
_ONLY = "AM_TESTS_ONLY_OLDER_NAME"

# Acts as if the packages were not installed, also in a process forked after they were imported.
HIDE = """
import sys


def hide(*packages):
    class Hidden:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] in packages:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    unload(*packages)
    sys.meta_path.insert(0, Hidden())


def unload(*packages):
    for name in [name for name in sys.modules if name.partition(".")[0] in packages]:
        del sys.modules[name]
"""
_EVERY_PROCESS = f"""{HIDE}

import os

if os.environ.get("{_ONLY}") == "yes":
    hide("lightning")
else:
    import lightning.pytorch
"""


def copy_renamed(target: Path) -> Path:
    """Make ``target`` a checkout whose tests use the older name; return ``target``."""
    shutil.copytree(ROOT / "tests", target / "tests", ignore=shutil.ignore_patterns("__pycache__", "*older_name.py"))
    for path in (target / "tests").rglob("*.py"):
        text = path.read_text()
        if "lightning" in text:
            path.write_text(_NAME.sub(lambda found: _OLDER[found[0]], text))
    (target / "tests" / "__init__.py").write_text(_EVERY_PROCESS)
    for name in ("am_lightning", "pyproject.toml"):
        (target / name).symlink_to(ROOT / name)
    return target


def run(copy: Path, *tests: str, only_older: bool) -> None:
    """Run pytest over ``tests`` of the copy; the newer name cannot be imported, or is loaded as well."""
    env = {**os.environ, "PYTHONPATH": str(copy), "COLUMNS": "240", _ONLY: "yes" if only_older else "no"}
    env.pop("PYTEST_XDIST_WORKER", None)
    command = [PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", *tests]
    done = subprocess.run(command, cwd=copy, env=env, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
