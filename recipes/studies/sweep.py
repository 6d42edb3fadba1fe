"""The two stages that all studies of optimizers share: tune the learning rate on one seed, compare on fresh ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from am_lightning.pretrain.runtime.errors import RecipeError
from recipes.studies.intervals import paired
from recipes.studies.ledger import Config, Ledger
from recipes.studies.tables import markdown

M = TypeVar("M")  # a method: hashable, and its str() is its name in tables


@dataclass(frozen=True)
class Sweep(Generic[M]):
    """Methods x learning rates on one seed, then every method at its best learning rate on fresh seeds.

    Attributes:
        ledger: of the finished runs.
        methods: to compare.
        rates: learning rate grid of each method.
        config: from method, learning rate and seed to a run's configuration.
        score: key of the result that is compared, lower is better; None in a result counts as infinite.
        unit: what the score is, for tables.
        sweep_seed: of the first stage.
        fresh_seeds: of the second.
    """

    ledger: Ledger
    methods: Sequence[M]
    rates: Callable[[M], Sequence[float]]
    config: Callable[[M, float, int], Config]
    score: str
    unit: str
    sweep_seed: int = 0
    fresh_seeds: tuple[int, ...] = (1, 2, 3, 4, 5)

    def sweep_configs(self) -> Iterator[Config]:
        """The runs of the first stage."""
        for method in self.methods:
            yield from (self.config(method, lr, self.sweep_seed) for lr in self.rates(method))

    def finalist_configs(self, methods: Sequence[M] | None = None) -> Iterator[Config]:
        """The runs of the second stage. RecipeError: the first is not complete."""
        rates = {method: self.best_rate(method) for method in methods or self.methods}
        for seed in self.fresh_seeds:
            yield from (self.config(method, lr, seed) for method, lr in rates.items())

    def value(self, config: Config) -> float:
        """The score of a run that is in the ledger."""
        value = self.ledger[config][self.score]
        return math.inf if value is None else float(value)

    def best_rate(self, method: M) -> float:
        """The learning rate with the least score in the first stage.

        Raises:
            RecipeError: a run is missing.
        """
        scores = {}
        for lr in self.rates(method):
            config = self.config(method, lr, self.sweep_seed)
            if config not in self.ledger:
                raise RecipeError(f"the sweep has no run of {method} at {lr:g} yet: run --stages sweep first")
            scores[lr] = self.value(config)
        return min(scores, key=lambda lr: scores[lr])

    def fresh(self, method: M) -> dict[int, float]:
        """Seed -> score of the second stage."""
        lr = self.best_rate(method)
        return {seed: self.value(self.config(method, lr, seed)) for seed in self.fresh_seeds}

    def sweep_table(self) -> str:
        """The score over the learning rate, one seed; the best of each method in bold."""
        every = sorted({lr for method in self.methods for lr in self.rates(method)})
        rows = []
        for method in self.methods:
            scores = {lr: self.value(self.config(method, lr, self.sweep_seed)) for lr in self.rates(method)}
            best = min(scores.values())
            cells = ["" if lr not in scores else bold(scores[lr], scores[lr] == best) for lr in every]
            rows.append([str(method), *cells])
        return markdown([f"seed {self.sweep_seed}", *(f"{lr:g}" for lr in every)], rows)

    def finalists_table(self) -> str:
        """Mean and standard deviation over the fresh seeds at each method's best learning rate."""
        rows = [
            [str(method), f"{self.best_rate(method):g}", mean_and_sd(list(self.fresh(method).values()))]
            for method in self.methods
        ]
        return markdown(["method", "lr", f"{self.unit}, mean (sd) of {len(self.fresh_seeds)} seeds"], rows)

    def differences_table(self, ours: Sequence[M]) -> str:
        """Paired differences of each of `ours` to every method, with 95 % intervals; negative: ours is better."""
        scores = {method: self.fresh(method) for method in self.methods}
        rows = [
            [str(other), *("" if mine == other else str(paired(scores[mine], scores[other])) for mine in ours)]
            for other in self.methods
        ]
        return markdown(["against", *(f"{mine} minus it" for mine in ours)], rows)


def mean_and_sd(values: Sequence[float]) -> str:
    """``1.234 (0.012)``, or "diverged" where one of the runs did."""
    array = np.array(values)
    return f"{array.mean():.3f} ({array.std(ddof=1):.3f})" if np.isfinite(array).all() else "diverged"


def bold(value: float, best: bool) -> str:
    """A score in a table, the best in bold."""
    if not math.isfinite(value):
        return "diverged"
    return f"**{value:.3f}**" if best else f"{value:.3f}"
