"""Pictures of a run, read back from its event file: losses above, momentum below.

`python recipes/plot.py runs/laptop` draws runs/laptop/summary.png again.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from am_lightning.recipes.errors import RecipeError
from am_lightning.recipes.files import replacing

LAYER_TAG = "am/beta/layer/"
# Okabe and Ito's palette: told apart with any colour vision.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
_INK, _GRID = "#333333", "#DDDDDD"
_HEATMAP_COLUMNS = 160
_SMOOTHING = 0.04  # share of the run that the mean of the training loss goes over


@dataclass(frozen=True)
class Run:
    """A run to draw: its name in the legend, its event file's folder, its validation loss after the last step."""

    name: str
    log_dir: Path
    final_val_loss: float | None = None


@dataclass(frozen=True)
class Curve:
    """A scalar's history: steps (n,) rising, values (n,)."""

    steps: np.ndarray
    values: np.ndarray


def read_curves(log_dir: Path) -> dict[str, Curve]:
    """All scalars in a folder's event files by tag. Where a step was logged twice (a resumed run) the later one counts.

    Raises:
        RecipeError: there is no event file.
    """
    if not list(log_dir.glob("events.out.tfevents.*")):
        raise RecipeError(f"{log_dir} holds no event file: was the run started with a TensorBoard logger?")
    events = EventAccumulator(str(log_dir), size_guidance={"scalars": 0})
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it tells of every resume
    events.Reload()
    curves = {}
    for tag in events.Tags()["scalars"]:
        latest = {event.step: event.value for event in events.Scalars(tag)}
        steps = sorted(latest)
        # Lightning counts steps from 0 where it logs; here a point at n is after n steps.
        curves[tag] = Curve(np.array(steps) + 1, np.array([latest[step] for step in steps]))
    return curves


def draw(path: Path, runs: list[Run], *, heatmap_of: int | None) -> None:
    """Draw the runs' losses in one picture, and below it the momentum of run number `heatmap_of` (if it has any).

    Raises:
        RecipeError: a run has no event file, or the picture cannot be written.
    """
    curves = [read_curves(run.log_dir) for run in runs]
    layers = _layers(curves[heatmap_of]) if heatmap_of is not None else []
    figure = Figure(figsize=(9, 7.5 if layers else 4.5), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    rows = figure.subplots(2 if layers else 1, 1, sharex=True, squeeze=False, height_ratios=[3, 2] if layers else [1])
    _draw_losses(rows[0, 0], runs, curves)
    if layers and heatmap_of is not None:
        name = runs[heatmap_of].name
        _draw_heatmap(figure, rows[1, 0], curves[heatmap_of], layers, f" of {name}" if name else "")
    rows[-1, 0].set_xlabel("optimizer step")
    rows[-1, 0].xaxis.set_major_locator(MaxNLocator(integer=True))
    with replacing(path, "Free some space and run recipes/plot.py on the run's folder.") as file:
        figure.savefig(file, format="png", dpi=150)


def _draw_losses(axes: Axes, runs: list[Run], curves: list[dict[str, Curve]]) -> None:
    single = len(runs) == 1
    for run, found, colour in zip(runs, curves, _COLOURS, strict=False):
        if train := found.get("train/loss"):
            if single:
                axes.plot(train.steps, train.values, color=colour, alpha=0.18, linewidth=0.8)
            axes.plot(*_smooth(train), color=colour, linewidth=1.2, alpha=1 if single else 0.6)
        if points := _validation_points(found, run.final_val_loss):
            own = _COLOURS[1] if single else colour
            axes.plot(*zip(*points, strict=True), color=own, marker="o", markersize=5, linewidth=1.6, clip_on=False)
    axes.set_ylabel("loss (nats per token)")
    axes.set_xlim(0, max([2, *(int(c.steps[-1]) for run in curves for tag, c in run.items() if tag == "train/loss")]))
    if not single and (top := _loss_after_start(curves)):
        axes.set_ylim(top=top)
    _style(axes)
    axes.grid(color=_GRID, linewidth=0.6)
    axes.legend(handles=_legend(runs), frameon=False, fontsize=9)


def _legend(runs: list[Run]) -> list[Line2D]:
    dots, plain = {"marker": "o", "markersize": 5, "linewidth": 1.6}, {"linewidth": 1.2}
    colours = _COLOURS if len(runs) > 1 else _COLOURS[1:]
    handles = []
    for run, colour in zip(runs, colours, strict=False):
        label = f"{run.name}: validation" if run.name else "validation"
        if run.final_val_loss is not None:
            label += f", {run.final_val_loss:.3f} at the end"
        handles.append(Line2D([], [], color=colour, label=label, **dots))
    if len(runs) > 1:
        handles.append(Line2D([], [], color=_INK, alpha=0.6, label="without dots: training, running mean", **plain))
    else:
        handles.append(Line2D([], [], color=_COLOURS[0], label="training, running mean", **plain))
    return handles


def _loss_after_start(curves: list[dict[str, Curve]]) -> float | None:
    """The highest training loss (running mean) after 5 % of a run: what is above hides the difference of the runs."""
    smooth = [_smooth(found["train/loss"])[1] for found in curves if "train/loss" in found]
    return max((float(values[len(values) // 20]) for values in smooth), default=None)


def _validation_points(curves: dict[str, Curve], final: float | None) -> list[tuple[float, float]]:
    points = dict(zip(curves["val/loss"].steps, curves["val/loss"].values, strict=True)) if "val/loss" in curves else {}
    if final is not None and "train/loss" in curves:
        points[curves["train/loss"].steps[-1]] = final
    return sorted(points.items())


def _smooth(curve: Curve) -> tuple[np.ndarray, np.ndarray]:
    """Centred running mean; the window shrinks at the ends."""
    half = max(0, round(len(curve.values) * _SMOOTHING / 2))
    sums = np.concatenate([[0.0], np.cumsum(curve.values)])
    index = np.arange(len(curve.values))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(curve.values))
    return curve.steps, (sums[high] - sums[low]) / (high - low)


def _layers(curves: dict[str, Curve]) -> list[str]:
    """The layers that have a momentum curve, from input to output."""
    names = [tag[len(LAYER_TAG) :] for tag in curves if tag.startswith(LAYER_TAG)]

    def depth(name: str) -> tuple[int, int, str]:
        number = re.search(r"\d+", name)
        place = 0 if "embed" in name else 1 if number else 2 if "norm" in name else 3
        return place, int(number[0]) if number else 0, name

    return sorted(names, key=depth)


def _draw_heatmap(figure: Figure, axes: Axes, curves: dict[str, Curve], layers: list[str], whose: str) -> None:
    steps = np.unique(np.concatenate([curves[LAYER_TAG + layer].steps for layer in layers]))
    values = np.full((len(layers), len(steps)), np.nan)
    for row, layer in enumerate(layers):
        curve = curves[LAYER_TAG + layer]
        values[row, np.searchsorted(steps, curve.steps)] = curve.values
    # Dips last a step or two: a column shows the lowest of its steps, or a long run's would be too thin to see.
    width = -(-len(steps) // _HEATMAP_COLUMNS)
    starts = np.arange(0, len(steps), width)
    lowest = np.fmin.reduceat(values, starts, axis=1)
    edges = np.concatenate([[steps[0] - 1], steps[starts[1:] - 1], [steps[-1]]])
    mesh = axes.pcolormesh(edges, np.arange(len(layers) + 1), lowest, cmap="YlGnBu_r", vmin=0.0, rasterized=True)
    axes.set_yticks(np.arange(len(layers)) + 0.5, layers)
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    title = rf"momentum $\beta_t${whose}, mean over a layer's tensors"
    if width > 1:
        title += f", lowest of {width} steps"
    axes.set_title(title, loc="left", fontsize=10, color=_INK)
    _style(axes)
    bar = figure.colorbar(mesh, ax=axes, pad=0.01, aspect=15)
    bar.outline.set_visible(False)


def _style(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(colors=_INK)
