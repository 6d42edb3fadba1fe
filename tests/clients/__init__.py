"""Other projects' programs with am_lightning, in their own releases: docs/clients, tests/clients.sh."""

from __future__ import annotations

import importlib
import os
import re
from pathlib import Path
from typing import Any

import pytest

PAGES = Path(__file__).parents[2] / "docs" / "clients"
REQUIRED_VARIABLE = "AM_CLIENTS_TESTS"  # "1" in tests/clients.sh, which has installed what its tests need


def client(module: str) -> Any:
    """Import a client's module. If it is missing, the test is skipped; in tests/clients.sh it fails."""
    if os.environ.get(REQUIRED_VARIABLE) == "1":
        return importlib.import_module(module)
    return pytest.importorskip(module)


def block(page: str, language: str) -> str:
    """Return the first code block of a language on a page of docs/clients."""
    found = re.search(rf"^```{language}\n(.*?)\n```$", (PAGES / page).read_text(), re.MULTILINE | re.DOTALL)
    assert found is not None, f"docs/clients/{page} has no block of {language}"
    return found[1]
