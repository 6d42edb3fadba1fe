"""The report's charts as plain data: the curves of each chart, thinned to what a screen can show."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from am_lightning.pretrain.commands.report.events import Curve
from am_lightning.pretrain.commands.report.runs import RunData

_SMOOTHING = 0.04  # window of the running mean, as a share of the points
_POINTS = 500  # in a curve, which is more than a chart has columns on a screen


def charts(runs: Sequence[RunData]) -> list[dict[str, Any]]:
    """Return the charts that have something to show, in the order of the page. The losses come first in any case.

    With several runs the losses' chart ends at the highest running mean after 5 % of a run. Higher ones hide how the
    runs differ. A series' `style` is "mean" (a running mean), "raw" (as logged, pale), "dots" (validations), "line", or
    "band" (from `values` to `upper`).
    """
    means = [smooth(run.train_loss).values for run in runs if run.train_loss and len(runs) > 1]
    top = max((float(values[len(values) // 20]) for values in means if len(values)), default=None)
    losses = _chart("loss", "Loss", "nats per token", _losses(runs, 0), top=top, floor=None)
    caps = _caps(runs)
    beta = "beta_t" + (f", cap {' and '.join(f'{cap:g}' for cap in caps)}" if caps else "")
    ratios = {"top": None if top is None else math.exp(min(top, 700)), "floor": None, "log": True}
    others = [
        _chart("perplexity", "Perplexity", "e to the loss, logarithmic axis", _losses(runs, 1), **ratios),
        _chart("beta", "Momentum, mean over all tensors", beta, _momentum(runs), reach=max(caps, default=None)),
        _chart("at_max", "Tensors at the cap", "share of tensors and steps", _each(runs, "at_max", mean=True)),
        _chart("at_zero", "Tensors without momentum", "share with beta_t = 0", _each(runs, "at_zero", mean=True)),
        _chart("grad_norm", "Gradient norm", "before clipping", _each(runs, "grad_norm", mean=True)),
        _chart("tokens", "Throughput", "tokens per second, all processes", _each(runs, "tokens_per_second")),
        _chart("mfu", "Model FLOPs utilization", "share of the devices' peak", _each(runs, "mfu")),
        _chart("lr", "Learning rate", "first group", _each(runs, "learning_rate")),
        _chart("skipped", "Skipped steps", "so far, because a sum was not finite", _each(runs, "skipped")),
    ]
    return [losses, *(chart for chart in others if chart["series"])]


def heatmaps(runs: Sequence[RunData]) -> list[dict[str, Any]]:
    """Return the momentum of layers x steps of every run that has it. The colours of all end at the same `top`."""
    found = [(number, heatmap(run.momentum)) for number, run in enumerate(runs) if run.momentum]
    values = [value for _, layers in found for row in layers["values"] for value in row if value is not None]
    top = _rounded(max([*values, *_caps(runs)], default=1.0), 3)
    return [layers | {"run": number, "by": _by(runs[number], layers["width"]), "top": top} for number, layers in found]


def _by(run: RunData, width: int) -> str:
    what = "the lowest beta_t of a layer's tensors"
    what += "" if run.has_layers else ", by layer group: this run has no curves of layers"
    return what if width == 1 else f"{what}; {width} logged points in a column"


def _chart(name: str, title: str, unit: str, series: list[dict[str, Any]], **limits: float | None) -> dict[str, Any]:
    """Return a chart. Its vertical axis is `log` or not, starts at `floor`, includes `reach`, and is cut at `top`."""
    usual = {"top": None, "floor": 0.0, "log": False, "reach": None}
    if name != "loss" and any(line["style"] == "mean" for line in series):  # the legend of the losses has it
        unit += ", running mean"
    return {"id": name, "title": title, "unit": unit, "series": series, **usual, **limits}


def _losses(runs: Sequence[RunData], exponent: int) -> list[dict[str, Any]]:
    """Return training and validation losses, or their exponentials if `exponent` is 1."""
    series = []
    for number, run in enumerate(runs):
        if train := run.train_loss:
            if len(runs) == 1:
                series.append(_series(number, "training, single steps", "raw", train, exponent))
            series.append(_series(number, "training, running mean", "mean", smooth(train), exponent))
        if points := run.validation_points:
            steps, values = zip(*points, strict=True)
            curve = Curve(np.array(steps, dtype=np.int64), np.array(values))
            series.append(_series(number, "validation", "dots", curve, exponent))
    return series


def _momentum(runs: Sequence[RunData]) -> list[dict[str, Any]]:
    """Return the mean, and behind it the band from the lowest to the highest of any tensor in any step."""
    series = []
    for number, run in enumerate(runs):
        if run.beta_ends is not None and run.beta_mean is not None:
            low, high = band(*run.beta_ends, _POINTS)
            series.append(_series(number, "lowest to highest", "band", low) | {"upper": _numbers(high.values, 5)})
    return series + _each(runs, "beta_mean", mean=True)


def _caps(runs: Sequence[RunData]) -> list[float]:
    return sorted({_rounded(run.cap, 4) for run in runs if run.cap is not None})


def _each(runs: Sequence[RunData], name: str, *, mean: bool = False) -> list[dict[str, Any]]:
    """Return one curve of every run that has it; `mean`: its running mean, and the points of one or two runs."""
    found = [(number, curve) for number, run in enumerate(runs) if (curve := getattr(run, name))]
    if not mean:
        return [_series(number, "", "line", curve) for number, curve in found]
    series = [_series(number, "as logged", "raw", curve) for number, curve in found if len(found) <= 2]
    return series + [_series(number, "running mean", "mean", smooth(curve)) for number, curve in found]


def _series(run: int, label: str, style: str, curve: Curve, exponent: int = 0) -> dict[str, Any]:
    short = thin(curve, 2 * _POINTS if style == "raw" else _POINTS)
    values = _numbers(np.exp(np.minimum(short.values, 700)) if exponent else short.values, 5)
    return {"run": run, "label": label, "style": style, "steps": short.steps.tolist(), "values": values}


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
    """Return at most about `points` points: both ends, and the lowest and the highest of each window."""
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


def heatmap(layers: dict[str, Curve], columns: int = 160) -> dict[str, Any]:
    """Return the momentum of some layers in at most `columns` columns, as plain data.

    A column shows the lowest of its points, because dips last a step or two and would be too thin to see.

    Returns:
        `rows`: the layers, in the given order; `edges`: columns + 1 steps, column i covers edges[i] < step <=
        edges[i + 1]; `values`: rows x columns, None if nothing was logged; `width`: logged points in a column.
    """
    steps = np.unique(np.concatenate([curve.steps for curve in layers.values()]))
    values = np.full((len(layers), len(steps)), np.nan)
    for row, curve in zip(values, layers.values(), strict=True):
        row[np.searchsorted(steps, curve.steps)] = curve.values
    width = -(-len(steps) // columns)
    starts = np.arange(0, len(steps), width)
    first = max(0, steps[0] - (steps[1] - steps[0] if len(steps) > 1 else 1))  # a point covers the steps before it
    edges = np.concatenate([[first], steps[starts[1:] - 1], [steps[-1]]]).tolist()
    lowest = [_numbers(row, 3) for row in np.fmin.reduceat(values, starts, axis=1)]
    return {"rows": list(layers), "edges": edges, "values": lowest, "width": width}


def _numbers(values: Iterable[float], digits: int) -> list[float | None]:
    """Replace nan and inf, which JSON does not have, by null, which interrupts the line."""
    return [_rounded(float(value), digits) if math.isfinite(value) else None for value in values]


def _rounded(value: float, digits: int) -> float:
    """Return a number with this many significant digits."""
    return float(f"{value:.{digits}g}")
