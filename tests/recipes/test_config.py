"""Every key of every YAML carries a comment."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "recipes" / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_key_is_commented(path: Path) -> None:
    lines = path.read_text().splitlines()
    keys = [i for i, line in enumerate(lines) if re.match(r"\s*(- )?\w+:", line)]
    assert len(keys) > 30
    bare = [lines[i] for i in keys if "#" not in lines[i] and not lines[i - 1].lstrip().startswith("#")]
    assert bare == []
