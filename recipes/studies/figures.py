"""Figures that the studies have in common."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from am_lightning.pretrain.runtime.atomic_files import replacing
from recipes.studies.sweep import M, Sweep

# The palette of Okabe and Ito, whose colours differ under any colour vision.
COLOURS = ("#999999", "#E69F00", "#CC79A7", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#F0E442", "#000000")
_INK = "#333333"
_GRID = "#DDDDDD"
_DPI = 110
_INCHES_PER_LETTER, _INCHES_PER_LINE = 0.08, 0.6  # in the legend


def new_figure(rows: int, columns: int, *, width: float, height: float) -> tuple[Figure, list[list[Axes]]]:
    """Return a figure and its panels ``axes[row][column]``, of `width` x `height` inches each."""
    figure = Figure(figsize=(columns * width, rows * height + 0.6), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False).tolist()


def style(axes: Axes, *, title: str = "", xlabel: str = "", ylabel: str | None = None) -> None:
    """Set the frame, the grid and the labels of a panel."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(True, color=_GRID, linewidth=0.6)
    axes.tick_params(colors=_INK, labelsize=8)
    axes.set_title(title, loc="left", fontsize=9, color=_INK)
    axes.set_xlabel(xlabel, fontsize=9, color=_INK)
    if ylabel is not None:
        axes.set_ylabel(ylabel, fontsize=9, color=_INK)


def save(figure: Figure, path: Path, *, legend_of: Axes | None = None) -> None:
    """Write a PNG, with one legend below all panels.

    Raises:
        RecipeError: if the file cannot be written.
    """
    if legend_of is not None:
        handles, labels = legend_of.get_legend_handles_labels()
        width = max(map(len, labels)) * _INCHES_PER_LETTER + _INCHES_PER_LINE
        columns = max(1, min(len(labels), 4, int(figure.get_figwidth() / width)))
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=9, frameon=False)
    with replacing(path, "Free some space, or choose another folder.") as file:
        figure.savefig(file, format="png", dpi=_DPI)


def draw_heatmap(
    path: Path, rows: Sequence[str], edges: np.ndarray, values: np.ndarray, title: str, *, lowest: float | None = None
) -> None:
    """Write a heat map of beta_t.

    Args:
        path: file of the PNG.
        rows: names of the rows, from the top.
        edges: (columns + 1,) steps at which the columns begin and end.
        values: (rows, columns) beta_t.
        title: title of the picture.
        lowest: value at the lower end of the colours, or None for the lowest of the values.
    """
    figure, ((panel,),) = new_figure(1, 1, width=9.0, height=0.35 * len(rows) + 1.2)
    places = np.arange(len(rows) + 1)
    mesh = panel.pcolormesh(edges, places, values, cmap="YlGnBu_r", vmin=lowest, rasterized=True)
    panel.set_yticks(places[:-1] + 0.5, rows)
    panel.invert_yaxis()
    style(panel, title=title, xlabel="step")
    panel.grid(False)
    figure.colorbar(mesh, ax=panel, pad=0.01, aspect=20).ax.tick_params(labelsize=8, colors=_INK)
    save(figure, path)


def plot_rates(
    panel: Axes, sweep: Sweep[M], lines: Iterable[tuple[str, M, dict[str, Any]]], ticks: Sequence[float]
) -> None:
    """Plot the score on the sweep's seed over the learning rates that were tried.

    Args:
        panel: panel of the lines.
        sweep: sweep with its first stage complete.
        lines: label, method, and matplotlib's keywords of each line.
        ticks: learning rates that are labelled if one of the methods has tried them.
    """
    known: set[float] = set()
    for label, method, look in lines:
        tried = sweep.tried(method)
        known |= tried.keys()
        panel.plot(list(tried), list(tried.values()), label=label, **look)
    shown = [lr for lr in ticks if lr in known]
    panel.set_xscale("log", base=2)
    panel.set_xticks(shown, [f"{lr:g}" for lr in shown])
