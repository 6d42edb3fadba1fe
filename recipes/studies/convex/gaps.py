"""The gaps to the optimum that tables and figures of the convex study show."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from recipes.studies.convex.methods import BETAS, METHODS
from recipes.studies.convex.protocol import STEP_SIZES, config
from recipes.studies.ledger import Ledger

FIXED_BETA = 0.9


class Gaps:
    """f - f* of every line of the tables: (method, fixed beta or "tuned") at a step size on a data set.

    "tuned" is the momentum with the least last gap at that very step size, which flatters it: it is picked afterwards.
    """

    def __init__(self, ledger: Ledger, steps: int) -> None:
        self.ledger, self.steps = ledger, steps

    @staticmethod
    def lines() -> Iterator[tuple[str, float | str | None, str]]:
        """(method, beta, name in a table)."""
        for method, name in METHODS.items():
            if method in ("heavy_ball", "nesterov"):
                yield method, FIXED_BETA, f"{name} {FIXED_BETA}"
                yield method, "tuned", f"{name}, tuned"
            else:
                yield method, None, name

    def curve(self, data: str, method: str, beta: float | str | None, step_size: float) -> np.ndarray:
        """(steps + 1,); infinite where the run diverged."""
        if beta == "tuned":
            return min((self.curve(data, method, b, step_size) for b in BETAS), key=lambda gaps: gaps[-1])
        assert not isinstance(beta, str)
        gaps = self.ledger[config(data, method, step_size, beta, self.steps)]["gaps"]
        return np.array([np.inf if gap is None else max(gap, 0.0) for gap in gaps])

    def last(self, data: str, method: str, beta: float | str | None) -> np.ndarray:
        """After the last step, one for each step size."""
        return np.array([self.curve(data, method, beta, size)[-1] for size in STEP_SIZES])
