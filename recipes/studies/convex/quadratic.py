"""Behaviour of beta_t on a diagonal quadratic: overshoot, and the momentum that is best for the next step."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from recipes.studies.convex.methods import gradient_step, make_optimizer

CURVATURES = torch.logspace(-2, 0, 20, dtype=torch.float64)  # L = 1, condition number 100
STEPS = 200
_GRID = torch.linspace(0, 1, 2001, dtype=torch.float64)


def _loss(x: Tensor) -> Tensor:
    return (CURVATURES * x.square()).sum(-1) / 2


def overshoot(method: str, beta: float | None, step_size: float) -> tuple[int, float, float]:
    """Run a method from x_0 = 1 (Proposition B.3 of the paper is about AM with at most 1 / L).

    Args:
        method: one of METHODS.
        beta: momentum of heavy ball and Nesterov.
        step_size: step size in units of 1 / L.

    Returns:
        The number of sign changes of all coordinates, the largest |x_i| on the far side of the minimum (0 if no
        coordinate crosses it), and f after the last step.
    """
    x = torch.ones(len(CURVATURES), dtype=torch.float64, requires_grad=True)
    optimizer = make_optimizer(method, beta, step_size, x)
    path = [x.detach().numpy().copy()]
    for _ in range(STEPS):
        gradient_step(_loss, optimizer, x)
        path.append(x.detach().numpy().copy())
    signs = np.sign(path)
    crossings = int((signs[1:] * signs[:-1] < 0).sum())
    return crossings, float(np.maximum(-np.array(path), 0).max()), float(_loss(x.detach()))


def next_step_regret(step_size: float, gap: str) -> list[tuple[float, float, float]]:
    """Compare AM's beta_t with the beta in [0, 1] that minimises f(x_{t+1}) (the subject of Proposition B.4).

    Args:
        step_size: step size in units of 1 / L.
        gap: "am_exact" or "am_first_order".

    Returns:
        For every step after the first: beta_t, the best beta, and f(x_{t+1}) / its value at the best beta - 1.
    """
    x = torch.ones(len(CURVATURES), dtype=torch.float64, requires_grad=True)
    optimizer = make_optimizer(gap, None, step_size, x)
    found = []
    for step in range(STEPS):
        before = x.detach().clone()
        gradient = CURVATURES * before
        memory = optimizer.state[x]["momentum_buffer"].clone() if step else gradient
        x.grad = gradient.clone()
        optimizer.step(lambda: float(_loss(x.detach())))
        if step:
            beta = float(optimizer.state[x]["beta"])
            betas = torch.cat([_GRID, torch.tensor([beta], dtype=torch.float64)])[:, None]
            values = _loss(before - step_size * (betas * memory + (1 - betas) * gradient))
            best = int(values[:-1].argmin())
            found.append((beta, float(_GRID[best]), float(values[-1] / values[best] - 1)))
    return found
