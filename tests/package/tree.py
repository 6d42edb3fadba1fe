"""The repository as these tests see it: its files, its modules, its pyproject.toml."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "am_lightning"
RECIPES = ROOT / "recipes"
STUDIES = RECIPES / "studies"  # not in the wheel

_LEFT_BY_TOOLS = {"__pycache__", "build", "dist", "runs", "lightning_logs", "node_modules"}


def files() -> list[Path]:
    """Return every file that git has or would add; without git (a source archive) all except what tools leave."""
    try:
        listing = subprocess.run(
            ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            capture_output=True,
            check=True,
        )
        paths = [ROOT / name for name in listing.stdout.decode().split("\0") if name]
    except (OSError, subprocess.CalledProcessError):
        paths = [path for path in ROOT.rglob("*") if not _is_left_over(path.relative_to(ROOT))]
    return sorted(path for path in set(paths) if path.is_file())


def _is_left_over(path: Path) -> bool:
    return any(part in _LEFT_BY_TOOLS or (part.startswith(".") and part != ".ci") for part in path.parts[:-1])


def texts() -> dict[Path, str]:
    """Return relative path -> content of every file that is UTF-8 text."""
    result = {}
    for path in files():
        try:
            result[path.relative_to(ROOT)] = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
    return result


def sources(*folders: Path) -> list[Path]:
    """Return the Python files below the folders."""
    return [path for path in files() if path.suffix == ".py" and any(folder in path.parents for folder in folders)]


def module_name(path: Path) -> str:
    """``am_lightning/optim/__init__.py`` -> ``am_lightning.optim``."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def version() -> str:
    """Return ``__version__`` as written in the source."""
    found = re.search(r'^__version__ = "([^"]+)"$', (PACKAGE / "__init__.py").read_text(), re.MULTILINE)
    assert found is not None, "am_lightning/__init__.py has no __version__"
    return found[1]


def extras() -> set[str]:
    """Return the names under ``[project.optional-dependencies]``."""
    text = (ROOT / "pyproject.toml").read_text()
    table = re.search(r"^\[project\.optional-dependencies\]$(.*?)^\[", text, re.MULTILINE | re.DOTALL)
    assert table is not None
    return set(re.findall(r"^([a-z-]+) = \[", table[1], re.MULTILINE))
