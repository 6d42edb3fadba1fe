"""The six programs of docs/start.md (tests/deepspeed runs DeepSpeed's)."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from .programs import START, betas, run_program, steps

COMMANDS = {
    "lightning_callback.py": [],
    "lightning_cli.py": [],  # its docstring has its arguments
    "accelerate_loop.py": [],
    "hf_trainer.py": [],
    "plain_pytorch.py": [],
    "deepspeed_engine.py": None,
}


def test_every_program_is_run_here() -> None:
    assert {path.name for path in START.glob("*.py")} == set(COMMANDS)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, arguments in COMMANDS.items() if arguments is not None])
def test_a_program_trains_and_leaves_its_curves(tmp_path: Path, name: str) -> None:
    command = [name]
    if name == "lightning_cli.py":
        text = (START / name).read_text().split('"""')[1].replace("\\\n", " ")
        command = shlex.split(text[text.index("python lightning_cli.py") :])[1:]
    run_program(tmp_path, command)
    found = betas(tmp_path)
    assert len(found) >= 100
    assert all(0 <= beta <= 0.8901 for beta in found)
    assert min(found) < 0.88, "beta_t hardly left its cap"
    assert steps(tmp_path, "train/loss") == steps(tmp_path, "am/beta/mean")
