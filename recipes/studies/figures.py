"""The look of the studies' figures."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from am_lightning.pretrain.runtime.atomic_files import replacing

# Okabe and Ito's palette: told apart with any colour vision.
COLOURS = ("#999999", "#E69F00", "#CC79A7", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#F0E442", "#000000")
INK = "#333333"
_GRID = "#DDDDDD"
_DPI = 110
_INCHES_PER_LETTER, _INCHES_PER_LINE = 0.08, 0.6  # of the legend


def new_figure(rows: int, columns: int, *, width: float, height: float) -> tuple[Figure, list[list[Axes]]]:
    """A grid of panels of `width` x `height` inches each; ``axes[row][column]``."""
    figure = Figure(figsize=(columns * width, rows * height + 0.6), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False).tolist()


def style(axes: Axes, *, title: str = "", xlabel: str = "", ylabel: str | None = None) -> None:
    """Quiet frame, grid and labels."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(True, color=_GRID, linewidth=0.6)
    axes.tick_params(colors=INK, labelsize=8)
    axes.set_title(title, loc="left", fontsize=9, color=INK)
    axes.set_xlabel(xlabel, fontsize=9, color=INK)
    if ylabel is not None:
        axes.set_ylabel(ylabel, fontsize=9, color=INK)


def save(figure: Figure, path: Path, *, legend_of: Axes | None = None) -> None:
    """Write a PNG, with one legend below all panels.

    Raises:
        RecipeError: the file cannot be written.
    """
    if legend_of is not None:
        handles, labels = legend_of.get_legend_handles_labels()
        width = max(map(len, labels)) * _INCHES_PER_LETTER + _INCHES_PER_LINE
        columns = max(1, min(len(labels), 4, int(figure.get_figwidth() / width)))
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=9, frameon=False)
    with replacing(path, "Free some space, or choose another folder.") as file:
        figure.savefig(file, format="png", dpi=_DPI)
