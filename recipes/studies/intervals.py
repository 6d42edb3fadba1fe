"""Means over seeds and paired differences, with Student's intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy import stats


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
    """Mean and Student's 95 % interval of independent samples.

    Args:
        values: the samples.
        comparisons: intervals that are to hold all at once with 95 % (Bonferroni's correction).

    Raises:
        ValueError: there is no sample.
    """
    if not values:
        raise ValueError("an interval needs at least one sample, but got none")
    count = len(values)
    if count == 1:
        return Interval(values[0], math.nan, 1)
    quantile = float(stats.t.ppf(1 - 0.025 / comparisons, count - 1))
    return Interval(float(np.mean(values)), quantile * float(np.std(values, ddof=1)) / math.sqrt(count), count)


def paired(first: Mapping[int, float], second: Mapping[int, float], *, comparisons: int = 1) -> Interval:
    """Of first - second over the seeds that both have; nan where a run diverged. `comparisons`: as in `interval`.

    Raises:
        ValueError: they share no seed.
    """
    shared = sorted(first.keys() & second.keys())
    if not shared:
        raise ValueError(f"no shared seed: {sorted(first)} and {sorted(second)}")
    differences = [first[seed] - second[seed] for seed in shared]
    if not all(math.isfinite(difference) for difference in differences):
        return Interval(math.nan, math.nan, len(shared))
    return interval(differences, comparisons=comparisons)
