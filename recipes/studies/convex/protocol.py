"""The problems and runs of the convex study, and the gaps to the optimum that its tables and figures show."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from sklearn import datasets
from torch import Tensor

from recipes.studies.convex.methods import BETAS, METHODS, descend, make_optimizer
from recipes.studies.ledger import Config, Ledger, Result

# Names of scikit-learn's loaders of data sets.
LOGISTIC = ("breast_cancer", "digits", "wine", "iris", "diabetes")
STEP_SIZES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)  # in units of 1 / L
FIXED_BETA = 0.9
_WITH_BETA = ("heavy_ball", "nesterov")


@dataclass(frozen=True)
class Problem:
    """A convex function on R^size, in float64.

    Attributes:
        loss: function from x (size,) to a 0-dim tensor.
        size: number of unknowns.
        smoothness: upper bound of the largest curvature L. Step sizes are given in units of 1 / L.
        minimum: lowest value of the loss.
    """

    loss: Callable[[Tensor], Tensor]
    size: int
    smoothness: float
    minimum: float


@functools.cache
def logistic(name: str) -> Problem:
    """Return multinomial logistic regression: mean cross-entropy plus |w|^2 / (2 n) (scikit-learn's C = 1), with bias.

    The features are standardised. The label of "diabetes", a regression set, is whether the progression is above the
    median. The softmax's Hessian is at most half the identity in logit space (Böhning 1992), so
    L <= eig_max(X'X / n) / 2 + 1 / n.
    """
    features, labels = _load(name)
    n = len(labels)
    spread = features.std(axis=0)
    features = (features - features.mean(axis=0)) / np.where(spread > 0, spread, 1)
    inputs = torch.tensor(np.concatenate([features, np.ones((n, 1))], axis=1))
    targets = torch.tensor(labels)
    classes = int(targets.max()) + 1
    columns = inputs.shape[1]

    def loss(x: Tensor) -> Tensor:
        return F.cross_entropy(inputs @ x.view(columns, classes), targets) + x.square().sum() / (2 * n)

    smoothness = float(torch.linalg.eigvalsh(inputs.T @ inputs / n)[-1]) / 2 + 1 / n
    return Problem(loss, columns * classes, smoothness, _minimum(loss, columns * classes))


def _load(name: str) -> tuple[np.ndarray, np.ndarray]:
    bunch: Any = getattr(datasets, f"load_{name}")()
    labels = bunch.target
    if name == "diabetes":
        labels = labels > np.median(labels)
    return np.asarray(bunch.data, dtype=np.float64), np.asarray(labels, dtype=np.int64)


def _minimum(loss: Callable[[Tensor], Tensor], size: int) -> float:
    def value_and_gradient(x: np.ndarray) -> tuple[float, np.ndarray]:
        point = torch.tensor(x, requires_grad=True)
        value = loss(point)
        (gradient,) = torch.autograd.grad(value, point)
        return float(value.detach()), gradient.numpy()

    options = {"maxiter": 20_000, "maxfun": 100_000, "ftol": 1e-18, "gtol": 1e-12, "maxcor": 50}
    return float(minimize(value_and_gradient, np.zeros(size), jac=True, method="L-BFGS-B", options=options).fun)


def configs(steps: int) -> Iterator[Config]:
    """Yield every method at every step size on every data set; heavy ball and Nesterov with every momentum."""
    for data in LOGISTIC:
        for method in METHODS:
            for step_size in STEP_SIZES:
                for beta in BETAS if method in _WITH_BETA else (None,):
                    yield _config(data, method, step_size, beta, steps)


def _config(data: str, method: str, step_size: float, beta: float | None, steps: int) -> Config:
    return {"data": data, "method": method, "step_size": step_size, "beta": beta, "steps": steps}


def run(config: Config) -> Result:
    """Return f - f* before every step and after the last (``gaps``). Infinite values are kept as None."""
    problem = logistic(config["data"])
    x = torch.zeros(problem.size, dtype=torch.float64, requires_grad=True)
    lr = config["step_size"] / problem.smoothness
    optimizer = make_optimizer(config["method"], config["beta"], lr, x)
    gaps = [value - problem.minimum for value in descend(problem.loss, optimizer, x, config["steps"])]
    return {"gaps": [gap if math.isfinite(gap) else None for gap in gaps]}


class Gaps:
    """f - f* of every line of the tables: (method, fixed beta or "tuned") at a step size on a data set.

    "tuned" is the momentum with the lowest last gap at that very step size, which flatters it, because it is chosen
    afterwards.
    """

    def __init__(self, ledger: Ledger, steps: int) -> None:
        self.ledger, self.steps = ledger, steps

    @staticmethod
    def lines() -> Iterator[tuple[str, float | str | None, str]]:
        """Yield method, beta, and name in a table."""
        for method, name in METHODS.items():
            if method in _WITH_BETA:
                yield method, FIXED_BETA, f"{name} {FIXED_BETA}"
                yield method, "tuned", f"{name}, tuned"
            else:
                yield method, None, name

    def curve(self, data: str, method: str, beta: float | str | None, step_size: float) -> np.ndarray:
        """Return the gaps (steps + 1,), infinite where the run diverged."""
        if beta == "tuned":
            return min((self.curve(data, method, b, step_size) for b in BETAS), key=lambda gaps: gaps[-1])
        assert not isinstance(beta, str)
        gaps = self.ledger[_config(data, method, step_size, beta, self.steps)]["gaps"]
        return np.array([np.inf if gap is None else max(gap, 0.0) for gap in gaps])

    def last(self, data: str, method: str, beta: float | str | None) -> np.ndarray:
        """Return the gap after the last step for each step size."""
        return np.array([self.curve(data, method, beta, size)[-1] for size in STEP_SIZES])
