"""Pictures with matplotlib: `summary.png` and `compare.png` of a run, and the report's PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from am_lightning.pretrain.commands.report.charts import charts, heatmaps
from am_lightning.pretrain.commands.report.runs import RunData
from am_lightning.pretrain.runtime.atomic_files import replacing

# Okabe and Ito's colours, which any colour vision can distinguish; those too pale on white are darker.
COLOURS = ("#0072B2", "#C44E00", "#00805B", "#B0538D", "#8A6500", "#4D4D4D", "#2F93C9", "#7A5CC0")
COLOUR_MAP = "magma"  # the loggers' pictures have it too: 0 is black, the cap is cream
_DASHES = ("-", "--", ":")
_DOTS: dict[str, Any] = {"marker": "o", "markersize": 5, "linewidth": 1.6}
_LINES: dict[str, dict[str, Any]] = {  # style of a series -> how its line is drawn
    "raw": {"alpha": 0.2, "linewidth": 0.7, "linestyle": "-"},
    "mean": {"linewidth": 1.2},
    "line": {"linewidth": 1.2},
    "dots": {"clip_on": False, **_DOTS},
}
_INK, _GRID = "#333333", "#DDDDDD"
_STYLE: Any = {"axes.spines.top": False, "axes.spines.right": False, "xtick.color": _INK, "ytick.color": _INK}
_TITLE: dict[str, Any] = {"loc": "left", "fontsize": 10, "color": _INK}
HINT = "Free some space and run `am-lightning report` on the run's folder."
OPTION = "am-lightning report --output FILE"


def look(number: int) -> tuple[str, str]:
    """Return colour and dashes of the run with this number. The dashes change when all colours are used."""
    return COLOURS[number % len(COLOURS)], _DASHES[number // len(COLOURS) % len(_DASHES)]


def save(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG.

    Raises:
        RecipeError: if it cannot be written.
    """
    with replacing(path, HINT, OPTION) as file:
        figure.savefig(file, format="png", dpi=110)


@matplotlib.rc_context(_STYLE)
def report_figure(runs: Sequence[RunData], *, curves: bool = True) -> Figure:
    """Return the picture of a report: losses, momentum by layer of every run that has it, and the other `curves`."""
    layers, (losses, *panels) = heatmaps(runs), charts(runs)
    panels = panels if curves else []
    heights = [4.2, *(0.9 + 0.16 * len(found["rows"]) for found in layers), *(2.2 for _ in panels[::2])]
    figure = Figure((11, sum(heights)), layout="constrained", facecolor="white")
    grid = figure.add_gridspec(len(heights), 2, height_ratios=heights)
    top = figure.add_subplot(grid[0, :])
    _draw_chart(top, losses, single=len(runs) == 1)
    top.set_ylabel("loss (nats per token)")
    top.set_xlabel("optimizer step")
    top.set_xlim(0, max([2, *(run.steps for run in runs)]))
    top.xaxis.set_major_locator(MaxNLocator(integer=True))
    top.legend(handles=_legend(runs), frameon=False, fontsize=9)
    for row, found in enumerate(layers, start=1):
        _draw_heatmap(figure, figure.add_subplot(grid[row, :], sharex=top), found, runs)
    for number, chart in enumerate(panels):
        axes = figure.add_subplot(grid[1 + len(layers) + number // 2, number % 2], sharex=top)
        _draw_chart(axes, chart, single=len(runs) == 1)
        axes.set_title(f"{chart['title']}, {chart['unit']}", **_TITLE)
    return figure


def _draw_chart(axes: Axes, chart: dict[str, Any], *, single: bool) -> None:
    """Draw the series of a chart as the page's script does."""
    dotted = any(series["style"] == "dots" for series in chart["series"])
    for series in chart["series"]:
        steps, style = series["steps"], series["style"]
        values, upper = (np.array(series.get(key, ()), dtype=float) for key in ("values", "upper"))  # None becomes nan
        colour, dashes = look(1 if single and style == "dots" else series["run"])
        if style == "band":
            axes.fill_between(steps, values, upper, color=colour, alpha=0.16, linewidth=0)
        else:
            faint = {"alpha": 0.6} if style == "mean" and dotted and not single else {}
            axes.plot(steps, values, color=colour, **{"linestyle": dashes, **_LINES[style], **faint})
    if chart["reach"] is not None:
        axes.axhline(chart["reach"], color=_INK, ls=":", linewidth=0.8)
    axes.set_yscale("log" if chart["log"] else "linear")
    axes.set_ylim(chart["floor"], chart["top"])
    axes.grid(color=_GRID, linewidth=0.6)


def _draw_heatmap(figure: Figure, axes: Axes, found: dict[str, Any], runs: Sequence[RunData]) -> None:
    """Draw the momentum of layers x steps."""
    rows = found["rows"]
    values = np.array(found["values"], dtype=float)  # None becomes nan
    options: dict[str, Any] = {"vmin": 0.0, "vmax": found["top"], "cmap": COLOUR_MAP, "rasterized": True}
    mesh = axes.pcolormesh(found["edges"], np.arange(len(rows) + 1), values, **options)
    axes.set_yticks(np.arange(len(rows)) + 0.5, rows, fontsize=9 if len(rows) < 16 else 6)
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    named = f" of {runs[found['run']].name}" if len(runs) > 1 else ""
    axes.set_title(f"Momentum by layer{named}: {found['by']}", **_TITLE)
    bar = figure.colorbar(mesh, ax=axes, pad=0.01, aspect=15)
    bar.outline.set_visible(False)


def _legend(runs: Sequence[RunData]) -> list[Line2D]:
    several = len(runs) > 1
    handles = []
    for number, run in enumerate(runs):
        colour, dashes = look(number if several else 1)
        if run.final_val_loss is not None:
            label = f"{run.name + ': ' if several else ''}validation, {run.final_val_loss:.3f} at the end"
            handles.append(Line2D([], [], color=colour, label=label, ls=dashes, **_DOTS))
        else:
            handles.append(Line2D([], [], color=look(number)[0], label=run.name or "training", ls=dashes))
    colour, alpha, mark = (_INK, 0.6, "without dots: ") if several else (COLOURS[0], 1.0, "")
    mean = Line2D([], [], color=colour, label=f"{mark}training, running mean", alpha=alpha, linewidth=1.2)
    return [*handles, mean]
