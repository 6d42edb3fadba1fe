"""LightningCLI in a real command: the callback and the optimizer by class path."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.python import COLD, PYTHON

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
from lightning.pytorch.cli import LightningCLI
from tests.lightning.model import Regression, quiet

class Plain(Regression):
    configure_optimizers = Regression.__base__.configure_optimizers  # LightningCLI gives it one


cli = LightningCLI(Plain, save_config_callback=None, trainer_defaults=quiet(max_steps=4))
(optimizer,) = cli.trainer.optimizers
print(type(optimizer).__name__, optimizer.scope, [round(g["beta1_max"], 6) for g in optimizer.param_groups])
assert all("beta_prod" in state for state in optimizer.state.values())
"""
FORMS = {
    "callback": (["--optimizer=AdamW", "--trainer.callbacks+=am_lightning.AdaptiveMemory"], "AMAdamW tensor [0.89]"),
    "callback with options": (
        [
            "--optimizer=torch.optim.AdamW",
            "--trainer.callbacks+=am_lightning.AdaptiveMemory",
            "--trainer.callbacks.scope=global",
            "--trainer.callbacks.beta1_max=0.7",
        ],
        "AMAdamW global [0.7]",
    ),
    "optimizer": (["--optimizer=am_lightning.AMAdamW", "--optimizer.betas=[0.6, 0.95]"], "AMAdamW tensor [0.6]"),
}


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_command_line(form: str, tmp_path: Path) -> None:
    options, expected = FORMS[form]
    program = tmp_path / "train.py"
    program.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{PROGRAM}")
    python = COLD if "--optimizer=AdamW" in options else PYTHON  # transformers may define an AdamW, too
    command = [python, str(program), "fit", *options, "--optimizer.lr=0.05"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert expected in done.stdout
