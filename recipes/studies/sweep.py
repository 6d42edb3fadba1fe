"""Studies of optimizers in two stages: tune the learning rates on one seed, then compare on fresh seeds.

Comparisons are paired differences over seeds, with Student's intervals.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from scipy import stats

from am_lightning.pretrain.runtime.errors import RecipeError
from recipes.studies.ledger import Config, Ledger
from recipes.studies.page import markdown

M = TypeVar("M")  # a method: hashable, and its str() is its name in tables


@dataclass(eq=False)
class Sweep(Generic[M]):
    """Methods x learning rates on one seed, then every method at its best learning rate on fresh seeds.

    Attributes:
        ledger: ledger of the finished runs.
        methods: methods to compare.
        rates: function that returns the learning rate grid of a method.
        config: function that returns the configuration of a run from method, learning rate and seed.
        score: key of the result that is compared. Lower is better, and None in a result counts as infinite.
        unit: name of the score in tables.
        sweep_seed: seed of the first stage.
        fresh_seeds: seeds of the second stage.
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
        """Yield the runs of the first stage."""
        for method in self.methods:
            yield from (self.config(method, lr, self.sweep_seed) for lr in self.rates(method))

    def finalist_configs(self, methods: Sequence[M] | None = None) -> Iterator[Config]:
        """Yield the runs of the second stage, by default of all methods.

        Raises:
            RecipeError: if the first stage is not complete.
        """
        rates = {method: self.best_rate(method) for method in methods or self.methods}
        for seed in self.fresh_seeds:
            yield from (self.config(method, lr, seed) for method, lr in rates.items())

    def value(self, config: Config) -> float:
        """Return the score of a run that is in the ledger."""
        value = self.ledger[config][self.score]
        return math.inf if value is None else float(value)

    def has_all(self, configs: Iterable[Config]) -> bool:
        """Return whether all runs are in the ledger. False if a run depends on an incomplete stage."""
        try:
            return all(config in self.ledger for config in configs)
        except RecipeError:
            return False

    def tried(self, method: M) -> dict[float, float]:
        """Return the score of the first stage at each learning rate of the grid that has been run, in order."""
        configs = {lr: self.config(method, lr, self.sweep_seed) for lr in self.rates(method)}
        return {lr: self.value(config) for lr, config in configs.items() if config in self.ledger}

    def best_rate(self, method: M) -> float:
        """Return the learning rate with the lowest score in the first stage.

        Raises:
            RecipeError: if a run is missing.
        """
        tried = self.tried(method)
        for lr in self.rates(method):
            if lr not in tried:
                raise RecipeError(f"the sweep has no run of {method} at {lr:g} yet: run --stages sweep first")
        return min(tried, key=lambda lr: tried[lr])

    def fresh(self, method: M) -> dict[int, float]:
        """Return the score of the second stage for each seed."""
        lr = self.best_rate(method)
        return {seed: self.value(self.config(method, lr, seed)) for seed in self.fresh_seeds}

    def sweep_table(self) -> str:
        """Return a table of the score over the learning rate on one seed, with the best of each method in bold."""
        tried = {method: self.tried(method) for method in self.methods}
        rates = sorted({lr for scores in tried.values() for lr in scores})
        rows = []
        for method, scores in tried.items():
            best = min(scores.values())
            rows.append([str(method), *("" if lr not in scores else _bold(scores[lr], best) for lr in rates)])
        return markdown([f"seed {self.sweep_seed}", *(f"{lr:g}" for lr in rates)], rows)

    def finalists_table(self) -> str:
        """Return a table of mean and standard deviation over the fresh seeds."""
        rows = [
            [str(method), f"{self.best_rate(method):g}", mean_and_sd(self.fresh(method).values())]
            for method in self.methods
        ]
        return markdown(["method", "lr", f"{self.unit}, mean (sd) of {len(self.fresh_seeds)} seeds"], rows)

    def differences_table(self, ours: Sequence[M], *, comparisons: int = 1) -> str:
        """Return a table of the `difference` of `ours` and every method. Negative: ours is better."""
        scores = {method: self.fresh(method) for method in self.methods}
        rows = [[str(method), *differences(scores, ours, method, comparisons=comparisons)] for method in self.methods]
        return markdown(["against", *(f"{mine} minus it" for mine in ours)], rows)


@dataclass(frozen=True)
class Interval:
    """A mean with half the width of its interval (nan for one sample), and the number of samples."""

    mean: float
    half_width: float
    samples: int

    def __str__(self) -> str:
        if not math.isfinite(self.mean):
            return f"diverged (n={self.samples})"
        width = "" if math.isnan(self.half_width) else f" ± {self.half_width:.3f}"
        return f"{self.mean:+.3f}{width} (n={self.samples})"


def interval(values: list[float], *, comparisons: int = 1) -> Interval:
    """Return mean and Student's 95 % interval of independent samples.

    Args:
        values: samples.
        comparisons: number of intervals that hold all at once with 95 % (Bonferroni's correction).

    Raises:
        ValueError: if there is no sample.
    """
    if not values:
        raise ValueError("an interval needs at least one sample, but got none")
    count = len(values)
    if count == 1:
        return Interval(values[0], math.nan, 1)
    quantile = float(stats.t.ppf(1 - 0.025 / comparisons, count - 1))
    return Interval(float(np.mean(values)), quantile * float(np.std(values, ddof=1)) / math.sqrt(count), count)


def paired(first: Mapping[int, float], second: Mapping[int, float], *, comparisons: int = 1) -> Interval:
    """Return the interval of first - second over the seeds that both have, nan if a run diverged.

    Raises:
        ValueError: if they share no seed.
    """
    shared = sorted(first.keys() & second.keys())
    if not shared:
        raise ValueError(f"no shared seed: {sorted(first)} and {sorted(second)}")
    differences = [first[seed] - second[seed] for seed in shared]
    if not all(math.isfinite(difference) for difference in differences):
        return Interval(math.nan, math.nan, len(shared))
    return interval(differences, comparisons=comparisons)


def difference(first: Mapping[int, float], second: Mapping[int, float], *, comparisons: int = 1) -> str:
    """Return first - second with its interval. Of several comparisons, the corrected half width is in parentheses."""
    alone = paired(first, second)
    if comparisons == 1 or not math.isfinite(alone.mean):
        return str(alone)
    together = paired(first, second, comparisons=comparisons)
    return f"{alone.mean:+.3f} ± {alone.half_width:.3f} ({together.half_width:.3f})"


def differences(
    scores: Mapping[M, Mapping[int, float]], ours: Sequence[M], method: M, *, comparisons: int = 1
) -> list[str]:
    """Return the cells of `ours` minus `method`, paired over the seeds of their scores."""
    return [
        "" if mine == method else difference(scores[mine], scores[method], comparisons=comparisons) for mine in ours
    ]


def mean_and_sd(values: Iterable[float]) -> str:
    """Return ``1.234 (0.012)``, or "diverged" if one of the runs did."""
    array = np.array(list(values))
    return f"{array.mean():.3f} ({array.std(ddof=1):.3f})" if np.isfinite(array).all() else "diverged"


def _bold(value: float, best: float) -> str:
    if not math.isfinite(value):
        return "diverged"
    return f"**{value:.3f}**" if value == best else f"{value:.3f}"
