"""Methods that are compared, each in its averaged form: d' = beta d + (1 - beta) g, x' = x - eta d'.

In this form, which AM's derivation uses, a step size means the same for every momentum (torch's usual form multiplies
it by 1 / (1 - beta)).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from am_lightning.optim import AMSGD

BETAS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99)  # candidates of "tuned" at every step size
# Name of the method in a configuration -> name in a table.
METHODS = {
    "gd": "gradient descent",
    "heavy_ball": "heavy ball",
    "nesterov": "Nesterov",
    "am_exact": "AM-MGD, exact gap",
    "am_first_order": "AM-MGD, first-order gap",
}


def make_optimizer(method: str, beta: float | None, lr: float, x: Tensor) -> torch.optim.Optimizer:
    """Return the optimizer of `x`. `beta` is the momentum of heavy ball and Nesterov.

    AM runs with lambda = 0 and without a cap (beta_t <= 1), as in the paper's convex experiments.
    """
    if method == "gd":
        return torch.optim.SGD([x], lr)
    if method in ("heavy_ball", "nesterov"):
        assert beta is not None
        if method == "heavy_ball":
            return torch.optim.SGD([x], lr, momentum=beta, dampening=beta)
        # torch allows no dampening here, so the step size has the factor.
        return torch.optim.SGD([x], lr * (1 - beta), momentum=beta, nesterov=True)
    gap = {"am_exact": "exact", "am_first_order": "first_order"}[method]
    return AMSGD([x], lr, beta_max=1.0, lambd=0.0, loss_gap=gap)


def gradient_step(loss: Callable[[Tensor], Tensor], optimizer: torch.optim.Optimizer, x: Tensor) -> float:
    """Take a full-batch step, and return the loss before it."""

    def closure() -> float:
        value = loss(x)
        (x.grad,) = torch.autograd.grad(value, x)
        return float(value.detach())

    return float(optimizer.step(closure))


def descend(loss: Callable[[Tensor], Tensor], optimizer: torch.optim.Optimizer, x: Tensor, steps: int) -> list[float]:
    """Return the loss before every step and after the last, ``steps + 1`` values."""
    values = [gradient_step(loss, optimizer, x) for _ in range(steps)]
    return [*values, float(loss(x.detach()))]
