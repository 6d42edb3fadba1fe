"""Data of the pictures: running means, thinned curves, and the momentum of layers x steps as a matrix."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from am_lightning.pretrain.commands.report.events import Curve, Floats

_SMOOTHING = 0.04  # window of the running mean, as a share of the points


class Heatmap(NamedTuple):
    """Momentum of layers x steps."""

    rows: list[str]  # layers, in the given order
    edges: NDArray[np.int64]  # (columns + 1,) steps; column i covers edges[i] < step <= edges[i + 1]
    values: Floats  # (rows, columns), nan if nothing was logged
    width: int  # logged points in a column, which shows the lowest of them


def smooth(curve: Curve) -> Curve:
    """Return the centred running mean of the finite points. The window shrinks at the ends."""
    finite = np.isfinite(curve.values)
    steps, values = curve.steps[finite], curve.values[finite]
    half = max(0, round(len(values) * _SMOOTHING / 2))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return Curve(steps, (sums[high] - sums[low]) / (high - low))


def thin(curve: Curve, points: int) -> Curve:
    """Return at most about `points` points: both ends, and the lowest and the highest of each window, so that spikes
    remain."""
    width = -(-2 * len(curve.steps) // points)
    if width < 3:
        return curve
    keep = {0, len(curve.steps) - 1}
    for start in range(0, len(curve.steps), width):
        window = np.nan_to_num(curve.values[start : start + width])
        keep |= {start + int(window.argmin()), start + int(window.argmax())}
    index = sorted(keep)
    return Curve(curve.steps[index], curve.values[index])


def band(low: Curve, high: Curve, points: int) -> tuple[Curve, Curve]:
    """Return at most about `points` points of both, the lowest and the highest of each window."""
    starts = np.arange(0, len(low.steps), max(1, -(-len(low.steps) // points)))
    ends = np.append(starts[1:], len(low.steps)) - 1
    steps = low.steps[ends]
    return Curve(steps, np.fmin.reduceat(low.values, starts)), Curve(steps, np.fmax.reduceat(high.values, starts))


def heatmap(layers: dict[str, Curve], columns: int = 160) -> Heatmap:
    """Return the momentum of some layers in at most `columns` columns.

    A column shows the lowest of its points, because dips last a step or two and would be too thin to see.
    """
    rows = list(layers)
    steps = np.unique(np.concatenate([curve.steps for curve in layers.values()]))
    values = np.full((len(rows), len(steps)), np.nan)
    for row, layer in enumerate(rows):
        values[row, np.searchsorted(steps, layers[layer].steps)] = layers[layer].values
    width = -(-len(steps) // columns)
    starts = np.arange(0, len(steps), width)
    first = max(0, steps[0] - (steps[1] - steps[0] if len(steps) > 1 else 1))  # a point covers the steps before it
    edges = np.concatenate([[first], steps[starts[1:] - 1], [steps[-1]]])
    return Heatmap(rows, edges, np.fmin.reduceat(values, starts, axis=1), width)
