"""timm's own factory and launcher with the optimizers that am_lightning.clients.timm registers."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch

from am_lightning import AMSGD, AMAdamW
from tests.clients import client
from tests.python import PYTHON

pytestmark = pytest.mark.nightly("clients")
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("name", "kind", "options"),
    [
        ("amadamw", AMAdamW, {"betas": (0.8, 0.99), "lambd": 0.2}),
        ("amsgd", AMSGD, {"momentum": 0.7, "scope": "tensor"}),
    ],
)
def test_timm_makes_them(name: str, kind: type, options: dict[str, object]) -> None:
    optim = client("timm.optim")
    import am_lightning.clients.timm  # noqa: F401

    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    optimizer = optim.create_optimizer_v2(model, opt=name, lr=0.1, weight_decay=0.05, **options)
    assert type(optimizer) is kind and optimizer.scope == options.get("scope", "tensor")
    decays = {param.ndim > 1: group["weight_decay"] for group in optimizer.param_groups for param in group["params"]}
    assert decays == {True: 0.05, False: 0.0}
    caps = {group[kind.cap_key] for group in optimizer.param_groups}
    assert caps == {0.8 if kind is AMAdamW else 0.7}
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()


def test_a_script_of_timms_finds_them(tmp_path: Path) -> None:
    client("timm")
    script = tmp_path / "train.py"
    script.write_text(
        "import sys\nfrom beside import NAME\nfrom timm.optim import list_optimizers\n"
        "print(sys.argv[1:], __name__, NAME in list_optimizers())\n"
    )
    (tmp_path / "beside.py").write_text("NAME = 'amadamw'\n")
    command = [PYTHON, "-m", "am_lightning.clients.timm", str(script), "--opt", "amadamw"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=120)
    assert done.stdout == "['--opt', 'amadamw'] __main__ True\n", done.stderr
