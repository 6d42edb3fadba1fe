"""The drill that kills runs at random file-system events, with a few kills."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import pytest

from tests.python import COLD

from .cluster.endings import PROGRAMS
from .commands import RECIPES, differences
from .random_kills import Run


@pytest.mark.nightly("kills at file-system events")
@pytest.mark.parametrize("program", PROGRAMS)
def test_runs_killed_at_random_events_leave_no_trace(program: str) -> None:
    command = [COLD, "-m", "tests.recipes.random_kills", "--kills", "2", "--programs", program]
    done = subprocess.run(command, cwd=RECIPES.parent, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 kills, seed 0: 0 of " in done.stdout


@pytest.mark.slow
def test_a_kill_in_the_first_checkpoint_of_the_hf_trainer(tmp_path: Path, corpus_folder: Path) -> None:
    """The Trainer itself would leave half of a checkpoint under its name, which no resume could pass over."""
    whole, killed = (Run(tmp_path / name, corpus_folder, "pretrain_hf_trainer.py") for name in ("whole", "killed"))
    assert whole.start(0) == 0, whole.log.read_text()
    events = whole.seen.read_text().splitlines()
    assert killed.start(1 + [event.endswith("trainer_state.json") for event in events].index(True)) == -signal.SIGKILL
    assert [path.name for path in (killed.root / "checkpoints").glob("[!.]*")] == []
    assert killed.start(0) == 0, killed.log.read_text()
    assert differences(killed.state(), whole.state()) == []
    assert [path.name for path in (killed.root / "checkpoints").glob("*.part")] == []
