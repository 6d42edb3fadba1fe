"""Pictures with matplotlib: `summary.png` and `compare.png` of a run, and the report's PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from am_lightning.pretrain.commands.report.events import Curve
from am_lightning.pretrain.commands.report.runs import RunData
from am_lightning.pretrain.commands.report.series import band, heatmap, smooth
from am_lightning.pretrain.runtime.atomic_files import replacing

# Okabe and Ito's colours, which any colour vision can distinguish; those too pale on white are darker.
COLOURS = ("#0072B2", "#C44E00", "#00805B", "#B0538D", "#8A6500", "#4D4D4D", "#2F93C9", "#7A5CC0")
COLOUR_MAP = "magma"  # as in the picture of the loggers: 0 is black, the cap cream
# Title, attribute of RunData, and whether a running mean is drawn over the points.
_PANELS = (
    (r"momentum $\beta_t$ of all tensors, and lowest to highest", "beta_mean", True),
    ("share of tensors at the cap of beta_t", "at_max", True),
    ("share of tensors with beta_t = 0", "at_zero", True),
    ("gradient norm, before clipping", "grad_norm", True),
    ("tokens per second, all processes", "tokens_per_second", False),
    ("steps skipped so far", "skipped", False),
    ("learning rate", "learning_rate", False),
)
_DASHES = ("-", "--", ":")
_DOTS: dict[str, Any] = {"marker": "o", "markersize": 5, "linewidth": 1.6}
_BAND_POINTS = 500
_INK, _GRID = "#333333", "#DDDDDD"
_CURE = "Free some space and run `am-lightning report` on the run's folder."


def look(number: int) -> tuple[str, str]:
    """Return colour and dashes of the run with this number. The dashes change when all colours are used."""
    return COLOURS[number % len(COLOURS)], _DASHES[number // len(COLOURS) % len(_DASHES)]


def save(figure: Figure, path: Path, dpi: int = 150) -> None:
    """Write a figure as a PNG.

    Raises:
        RecipeError: if it cannot be written.
    """
    with replacing(path, _CURE) as file:
        figure.savefig(file, format="png", dpi=dpi)


def draw(path: Path, runs: Sequence[RunData]) -> None:
    """Draw the runs' losses in one picture, and below them the momentum of the first run if it has any.

    Raises:
        RecipeError: if the picture cannot be written.
    """
    layers = bool(runs[0].momentum)
    figure = Figure((9, 7.5 if layers else 4.5), layout="constrained", facecolor="white")
    rows = figure.subplots(2 if layers else 1, 1, sharex=True, squeeze=False, height_ratios=[3, 2] if layers else [1])
    _draw_losses(rows[0, 0], runs)
    if layers:
        _draw_heatmap(figure, rows[1, 0], runs[0], named=len(runs) > 1)
    _step_axis(rows[-1, 0])
    save(figure, path)


def report_figure(runs: Sequence[RunData]) -> Figure:
    """Return the picture of a report: losses, momentum by layer of every run that has it, and other curves."""
    panels = [panel for panel in _PANELS if any(getattr(run, panel[1]) for run in runs)]
    with_momentum = [run for run in runs if run.momentum]
    pairs = -(-len(panels) // 2)
    heights = [4.2, *(0.9 + 0.16 * len(run.momentum) for run in with_momentum), *(2.2 for _ in range(pairs))]
    figure = Figure((11, sum(heights)), layout="constrained", facecolor="white")
    grid = figure.add_gridspec(len(heights), 2, height_ratios=heights)
    losses = figure.add_subplot(grid[0, :])
    _draw_losses(losses, runs)
    _step_axis(losses)
    for row, run in enumerate(with_momentum, start=1):
        axes = figure.add_subplot(grid[row, :], sharex=losses)
        _draw_heatmap(figure, axes, run, named=len(runs) > 1)
    for number, (title, name, smoothed) in enumerate(panels):
        axes = figure.add_subplot(grid[1 + len(with_momentum) + number // 2, number % 2], sharex=losses)
        _draw_panel(axes, title, [getattr(run, name) for run in runs], smoothed=smoothed)
        if name == "beta_mean":
            _draw_ends(axes, runs)
    return figure


def _draw_losses(axes: Axes, runs: Sequence[RunData]) -> None:
    """Draw training losses as running means and validation losses with dots."""
    single = len(runs) == 1
    for number, run in enumerate(runs):
        colour, dashes = look(number)
        if train := run.train_loss:
            if single:
                axes.plot(train.steps, train.values, color=colour, alpha=0.18, linewidth=0.8)
            mean = smooth(train)
            axes.plot(mean.steps, mean.values, color=colour, ls=dashes, linewidth=1.2, alpha=1 if single else 0.6)
        if points := run.validation_points:
            own = COLOURS[1] if single else colour
            axes.plot(*zip(*points, strict=True), color=own, ls=dashes, clip_on=False, **_DOTS)
    axes.set_ylabel("loss (nats per token)")
    axes.set_xlim(0, max([2, *(run.steps for run in runs)]))
    if not single and (top := loss_after_start(runs)):
        axes.set_ylim(top=top)
    _style(axes)
    axes.grid(color=_GRID, linewidth=0.6)
    axes.legend(handles=_legend(runs), frameon=False, fontsize=9)


def loss_after_start(runs: Sequence[RunData]) -> float | None:
    """Return the highest training loss (running mean) after 5 % of a run. Higher ones hide how the runs differ."""
    means = [smooth(run.train_loss).values for run in runs if run.train_loss]
    return max((float(values[len(values) // 20]) for values in means if len(values)), default=None)


def _draw_heatmap(figure: Figure, axes: Axes, run: RunData, *, named: bool) -> None:
    """Draw the momentum of layers x steps."""
    found = heatmap(run.momentum)
    places = np.arange(len(found.rows) + 1)
    limits: dict[str, Any] = {"vmin": 0.0, "vmax": run.cap}
    mesh = axes.pcolormesh(found.edges, places, found.values, cmap=COLOUR_MAP, rasterized=True, **limits)
    axes.set_yticks(np.arange(len(found.rows)) + 0.5, found.rows, fontsize=9 if len(found.rows) < 16 else 6)
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    title = rf"momentum $\beta_t${f' of {run.name}' if named else ''}, "
    title += f"{'lowest' if run.has_lowest else 'mean'} of a layer{'' if run.has_layers else ' group'}'s tensors"
    if found.width > 1:
        title += f", lowest of {found.width} logged points"
    axes.set_title(title, loc="left", fontsize=10, color=_INK)
    _style(axes)
    bar = figure.colorbar(mesh, ax=axes, pad=0.01, aspect=15)
    bar.outline.set_visible(False)


def _draw_panel(axes: Axes, title: str, curves: Sequence[Curve | None], *, smoothed: bool) -> None:
    for number, curve in enumerate(curves):
        if curve is None:
            continue
        colour, dashes = look(number)
        axes.plot(curve.steps, curve.values, color=colour, alpha=0.2 if smoothed else 0, linewidth=0.6)
        shown = smooth(curve) if smoothed else curve
        axes.plot(shown.steps, shown.values, color=colour, ls=dashes, linewidth=1.2)
    axes.set_title(title + (", running mean" if smoothed else ""), loc="left", fontsize=10, color=_INK)
    axes.set_ylim(bottom=0)
    _style(axes)
    axes.grid(color=_GRID, linewidth=0.6)


def _draw_ends(axes: Axes, runs: Sequence[RunData]) -> None:
    """Draw the band from the lowest to the highest beta_t of any tensor in any step, and the caps."""
    for number, run in enumerate(runs):
        if run.beta_ends is not None:
            low, high = band(*run.beta_ends, _BAND_POINTS)
            axes.fill_between(low.steps, low.values, high.values, color=look(number)[0], alpha=0.16, linewidth=0)
    caps = {run.cap for run in runs if run.cap is not None}
    for cap in caps:
        axes.axhline(cap, color=_INK, ls=":", linewidth=0.8)
    if caps:
        axes.set_ylim(top=1.04 * max(caps))


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
    if several:
        mean = Line2D([], [], color=_INK, alpha=0.6, label="without dots: training, running mean", linewidth=1.2)
    else:
        mean = Line2D([], [], color=COLOURS[0], label="training, running mean", linewidth=1.2)
    return [*handles, mean]


def _step_axis(axes: Axes) -> None:
    axes.set_xlabel("optimizer step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _style(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(colors=_INK)
