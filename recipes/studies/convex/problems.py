"""Smooth convex functions with a known minimum: regularised logistic regression on real data, diagonal quadratics."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from sklearn import datasets
from torch import Tensor

# Data sets of scikit-learn, by the name of their loader.
LOGISTIC = ("breast_cancer", "digits", "wine", "iris", "diabetes")


@dataclass(frozen=True)
class Problem:
    """A convex function on R^size, in float64.

    Attributes:
        loss: from x (size,) to a 0-dim tensor.
        size: number of unknowns.
        smoothness: an upper bound of the largest curvature L; step sizes are given in units of 1 / L.
        minimum: the least value of the loss.
    """

    loss: Callable[[Tensor], Tensor]
    size: int
    smoothness: float
    minimum: float


@functools.cache
def logistic(name: str) -> Problem:
    """Multinomial logistic regression, mean cross-entropy plus |w|^2 / (2 n) (scikit-learn's C = 1), bias included.

    The features are standardised. "diabetes" (a regression set) asks whether the progression is above the median. The
    softmax's Hessian is at most half the identity in logit space (Böhning 1992), so L <= eig_max(X'X / n) / 2 + 1 / n.
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


def quadratic(curvatures: Tensor) -> Callable[[Tensor], Tensor]:
    """f(x) = sum a_i x_i^2 / 2 for curvatures a (size,)."""
    return lambda x: (curvatures * x.square()).sum() / 2


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
