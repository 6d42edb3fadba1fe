"""The drill that kills runs at random file-system events, with a few kills."""

from __future__ import annotations

import subprocess

import pytest

from tests.python import COLD

from .cluster.endings import PROGRAMS
from .commands import RECIPES


@pytest.mark.nightly("kills at file-system events")
@pytest.mark.parametrize("program", PROGRAMS)
def test_runs_killed_at_random_events_leave_no_trace(program: str) -> None:
    command = [COLD, "-m", "tests.recipes.random_kills", "--kills", "2", "--programs", program]
    done = subprocess.run(command, cwd=RECIPES.parent, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 kills, seed 0: 0 of " in done.stdout
