"""The values that an interval of steps must show, from the beta_t of every tensor after every step."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence

import pytest


def numbers_of(seen: Sequence[Mapping[str, float]], cap: float = 0.89) -> dict[str, float]:
    """Return the values of the steps in ``seen``, which are one interval: name -> beta_t, nan before its first step."""
    betas = [beta for step in seen for beta in step.values() if beta == beta]
    return {
        "am/beta/mean": sum(betas) / len(betas),
        "am/beta/min": min(betas),
        "am/beta/max": max(betas),
        "am/beta/effective_steps": 1 / (1 - sum(betas) / len(betas)),
        "am/clamp/at_max": sum(beta > cap - 1e-6 for beta in betas) / len(betas),
        "am/clamp/at_zero": sum(beta == 0 for beta in betas) / len(betas),
    }


def curves_of(
    seen: Sequence[Mapping[str, float]], ends: Iterable[int], *, begins: int = 0, cap: float = 0.89
) -> dict[str, dict[int, float]]:
    """Return tag -> step -> value, with a point logged after each number of steps in ``ends``.

    Args:
        begins: number of steps before the first interval. Default: 0.
    """
    curves: dict[str, dict[int, float]] = {}
    for after, until in itertools.pairwise([begins, *ends]):
        for tag, value in numbers_of(seen[after:until], cap).items():
            curves.setdefault(tag, {})[until] = value
    return curves


def assert_curves(
    found: Mapping[str, Mapping[int, float]], expected: dict[str, dict[int, float]], axis: int = 0
) -> None:
    """Compare curves. ``axis`` is the logger's step minus the number of steps made."""
    for tag, points in expected.items():
        wanted = {step + axis: value for step, value in points.items()}
        assert found[tag] == pytest.approx(wanted, rel=2e-6, abs=1e-7), tag
