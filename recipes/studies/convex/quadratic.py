"""What beta_t does on a diagonal quadratic: overshoot, and the momentum that is best for the next step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from recipes.studies.convex.methods import gradient_step, make_optimizer
from recipes.studies.convex.problems import quadratic

CURVATURES = torch.logspace(-2, 0, 20, dtype=torch.float64)  # L = 1, condition number 100
STEPS = 200
_GRID = torch.linspace(0, 1, 2001, dtype=torch.float64)


@dataclass(frozen=True)
class Overshoot:
    """Of a run from x_0 = 1.

    Attributes:
        crossings: how often a coordinate changes its sign, all coordinates together.
        furthest: the largest |x_i| reached on the far side of the minimum; 0 where none crosses.
        gap: f after the last step.
    """

    crossings: int
    furthest: float
    gap: float


def overshoot(method: str, beta: float | None, step_size: float) -> Overshoot:
    """Run a method with step size `step_size` / L (Proposition B.3 of the paper is about AM at most at 1 / L)."""
    path, gap = _run(method, beta, step_size)
    signs = np.sign(path)
    crossings = int((signs[1:] * signs[:-1] < 0).sum())
    return Overshoot(crossings, float(np.maximum(-path, 0).max()), gap)


def next_step_regret(step_size: float, gap: str) -> list[tuple[float, float, float]]:
    """AM's beta_t beside the beta in [0, 1] that minimises f(x_{t+1}) (the subject of Proposition B.4).

    Args:
        step_size: in units of 1 / L.
        gap: "am_exact" or "am_first_order".

    Returns:
        for every step after the first: beta_t, the best beta, f(x_{t+1}) / its value at the best beta - 1.
    """
    x = torch.ones(len(CURVATURES), dtype=torch.float64, requires_grad=True)
    optimizer = make_optimizer(gap, None, step_size, x)
    loss = quadratic(CURVATURES)
    found = []
    for step in range(STEPS):
        before = x.detach().clone()
        gradient = CURVATURES * before
        memory = optimizer.state[x]["momentum_buffer"].clone() if step else gradient
        x.grad = gradient.clone()
        optimizer.step(lambda: float(loss(x.detach())))
        if step:
            found.append(_compare(before, gradient, memory, step_size, float(optimizer.state[x]["beta"])))
    return found


def _compare(x: Tensor, gradient: Tensor, memory: Tensor, lr: float, beta: float) -> tuple[float, float, float]:
    betas = torch.cat([_GRID, torch.tensor([beta], dtype=torch.float64)])[:, None]
    after = x - lr * (betas * memory + (1 - betas) * gradient)
    values = (CURVATURES * after.square()).sum(1) / 2
    best = int(values[:-1].argmin())
    return beta, float(_GRID[best]), float(values[-1] / values[best] - 1)


def _run(method: str, beta: float | None, step_size: float) -> tuple[np.ndarray, float]:
    x = torch.ones(len(CURVATURES), dtype=torch.float64, requires_grad=True)
    optimizer = make_optimizer(method, beta, step_size, x)
    loss = quadratic(CURVATURES)

    path = [x.detach().numpy().copy()]
    for _ in range(STEPS):
        gradient_step(loss, optimizer, x)
        path.append(x.detach().numpy().copy())
    return np.array(path), float(loss(x.detach()))
