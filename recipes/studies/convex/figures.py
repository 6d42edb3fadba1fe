"""Pictures of the convex study."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from recipes.studies.convex.gaps import Gaps
from recipes.studies.convex.problems import LOGISTIC
from recipes.studies.convex.protocol import STEP_SIZES
from recipes.studies.figures import COLOURS, new_figure, save, style

SHOWN_STEP_SIZES = (0.5, 2.0, 16.0)
_FLOOR = 1e-12


def draw_curves(path: Path, gaps: Gaps) -> None:
    """f - f* over steps: a row for each of three step sizes, a column for each data set."""
    figure, axes = new_figure(len(SHOWN_STEP_SIZES), len(LOGISTIC), width=3.0, height=2.4)
    for row, size in enumerate(SHOWN_STEP_SIZES):
        for column, data in enumerate(LOGISTIC):
            panel = axes[row][column]
            for number, (method, beta, name) in enumerate(gaps.lines()):
                curve = np.maximum(gaps.curve(data, method, beta, size), _FLOOR)
                _line(panel, np.arange(len(curve)), curve, number, method, beta, name)
            start = gaps.curve(data, "gd", None, size)[0]
            panel.set_ylim(_FLOOR, 30 * start)
            style(panel, title=f"{data}, step {size:g} / L", xlabel="step" if row == len(axes) - 1 else "")
        axes[row][0].set_ylabel("f - f*")
    save(figure, path, legend_of=axes[0][0])


def draw_sensitivity(path: Path, gaps: Gaps) -> None:
    """f - f* after the last step over the step size, a panel for each data set."""
    figure, axes = new_figure(1, len(LOGISTIC), width=3.0, height=2.8)
    for column, data in enumerate(LOGISTIC):
        panel = axes[0][column]
        for number, (method, beta, name) in enumerate(gaps.lines()):
            last = np.maximum(gaps.last(data, method, beta), _FLOOR)
            _line(panel, np.array(STEP_SIZES), last, number, method, beta, name)
        panel.set_xscale("log", base=2)
        panel.set_ylim(_FLOOR, 10)
        style(panel, title=data, xlabel="step size x L")
    axes[0][0].set_ylabel(f"f - f* after {gaps.steps} steps")
    save(figure, path, legend_of=axes[0][0])


def _line(
    panel: Axes, x: np.ndarray, y: np.ndarray, number: int, method: str, beta: float | str | None, name: str
) -> None:
    ours = method.startswith("am_")
    dashes = "--" if beta == "tuned" else "-"
    panel.semilogy(
        x, y, dashes, color=COLOURS[number], linewidth=2.0 if ours else 1.2, label=name, zorder=3 if ours else 2
    )
