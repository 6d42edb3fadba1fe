"""Which runs the convex study makes, and one of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch

from am_lightning.pretrain.runtime.errors import require
from recipes.studies.convex.methods import BETAS, METHODS, descend, make_optimizer
from recipes.studies.convex.problems import LOGISTIC, logistic
from recipes.studies.ledger import Config, Ledger, Result

STEP_SIZES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)  # in units of 1 / L


def configs(steps: int) -> Iterator[Config]:
    """Every method at every step size on every data set; heavy ball and Nesterov with every momentum."""
    for data in LOGISTIC:
        for method in METHODS:
            for step_size in STEP_SIZES:
                for beta in BETAS if method in ("heavy_ball", "nesterov") else (None,):
                    yield config(data, method, step_size, beta, steps)


def config(data: str, method: str, step_size: float, beta: float | None, steps: int) -> Config:
    """One run, as the ledger keeps it."""
    return {"data": data, "method": method, "step_size": step_size, "beta": beta, "steps": steps}


def run(config: Config) -> Result:
    """f - f* before every step and after the last (``gaps``); infinite values are kept as None."""
    problem = logistic(config["data"])
    x = torch.zeros(problem.size, dtype=torch.float64, requires_grad=True)
    lr = config["step_size"] / problem.smoothness
    optimizer = make_optimizer(config["method"], config["beta"], lr, x)
    gaps = [value - problem.minimum for value in descend(problem.loss, optimizer, x, config["steps"])]
    return {"gaps": [gap if math.isfinite(gap) else None for gap in gaps]}


def study(path: Path, *, steps: int, workers: int) -> Ledger:
    """Make the runs that `path` lacks.

    Raises:
        RecipeError: a number is out of range.
    """
    require(steps >= 1, "--steps", steps, "a whole number >= 1")
    ledger = Ledger(path)
    ledger.run(configs(steps), run, workers=workers)
    return ledger
