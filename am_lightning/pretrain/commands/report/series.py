"""What the pictures draw: running means, thinned curves, and the momentum of layers x steps as a matrix."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from am_lightning.pretrain.commands.report.events import Curve, Floats

SMOOTHING = 0.04  # share of the run that a running mean goes over
HEATMAP_COLUMNS = 160


@dataclass(frozen=True)
class Heatmap:
    """Momentum of layers x steps.

    Attributes:
        rows: layers, as they were given.
        edges: (columns + 1,) steps; column i is of the steps after edges[i] up to edges[i + 1].
        values: (rows, columns), nan where nothing was logged.
        width: logged points in a column, of which it has the lowest.
    """

    rows: list[str]
    edges: NDArray[np.int64]
    values: Floats
    width: int


def smooth(curve: Curve, share: float = SMOOTHING) -> Curve:
    """Centred running mean over a share of the points, whose window shrinks at the ends; without non-finite points."""
    finite = np.isfinite(curve.values)
    steps, values = curve.steps[finite], curve.values[finite]
    half = max(0, round(len(values) * share / 2))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return Curve(steps, (sums[high] - sums[low]) / (high - low))


def thin(curve: Curve, points: int) -> Curve:
    """At most about `points` points, evenly spaced by index, with the first and the last."""
    if len(curve.steps) <= points:
        return curve
    index = np.unique(np.linspace(0, len(curve.steps) - 1, points).round().astype(np.int64))
    return Curve(curve.steps[index], curve.values[index])


def extremes(curve: Curve, points: int) -> Curve:
    """At most about `points` points, the lowest and the highest of each window: the spikes that thinning would hide."""
    width = max(1, -(-len(curve.steps) // (points // 2)))
    if width < 3:
        return curve
    keep: list[int] = []
    for start in range(0, len(curve.steps), width):
        window = np.nan_to_num(curve.values[start : start + width])
        keep += sorted({start + int(window.argmin()), start + int(window.argmax())})
    return Curve(curve.steps[keep], curve.values[keep])


def band(low: Curve, high: Curve, points: int) -> tuple[Curve, Curve]:
    """At most about `points` points of both, the lowest and the highest of each window."""
    starts = np.arange(0, len(low.steps), max(1, -(-len(low.steps) // points)))
    ends = np.append(starts[1:], len(low.steps)) - 1
    steps = low.steps[ends]
    return Curve(steps, np.fmin.reduceat(low.values, starts)), Curve(steps, np.fmax.reduceat(high.values, starts))


def heatmap(layers: dict[str, Curve], columns: int = HEATMAP_COLUMNS) -> Heatmap:
    """The momentum of some layers, at most `columns` columns wide.

    Dips last a step or two: a column has the lowest of its steps, or a long run's would be too thin to see.
    """
    rows = list(layers)
    steps = np.unique(np.concatenate([curve.steps for curve in layers.values()]))
    values = np.full((len(rows), len(steps)), np.nan)
    for row, layer in enumerate(rows):
        values[row, np.searchsorted(steps, layers[layer].steps)] = layers[layer].values
    width = -(-len(steps) // columns)
    starts = np.arange(0, len(steps), width)
    first = max(0, steps[0] - (steps[1] - steps[0] if len(steps) > 1 else 1))  # a point is of the steps before it
    edges = np.concatenate([[first], steps[starts[1:] - 1], [steps[-1]]])
    return Heatmap(rows, edges, np.fmin.reduceat(values, starts, axis=1), width)
