"""Figures of the batch study: AM's gain over the batch, sensitivity to the learning rate, and beta_t over time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from recipes.studies.figures import COLOURS, new_figure, plot_rates, save, style
from recipes.studies.pretraining.batch_tables import gain
from recipes.studies.pretraining.batches import CUSTOMARY, DEFAULT, leader, trace_config
from recipes.studies.pretraining.methods import Method
from recipes.studies.pretraining.results import at_cap
from recipes.studies.pretraining.tuning import COARSE, Tuning

_WINDOW = 0.05  # share of a run over which the curves of beta_t are smoothed
_HEADROOM = 0.7  # nats per token between a panel's lowest loss and its upper end


def draw_gains(path: Path, kinds: Mapping[str, Sequence[Tuning]], comparisons: int) -> None:
    """Draw AM minus AdamW over the batch, a panel for each kind of cell, with 95 % intervals.

    The intervals are corrected for `comparisons` comparisons.
    """
    figure, axes = new_figure(1, len(kinds), width=5.0, height=4.0)
    for panel, (title, tunings) in zip(axes[0], kinds.items(), strict=True):
        batches = [tuning.scale.batch_size for tuning in tunings]
        for number, (warmup, label) in enumerate(((True, "any warmup"), (False, "no warmup"))):
            found = [gain(tuning, warmup=warmup, comparisons=comparisons) for tuning in tunings]
            panel.errorbar(
                [batch * (1 + 0.04 * number) for batch in batches],
                [interval.mean for interval in found],
                [interval.half_width for interval in found],
                label=f"best AM minus best AdamW, {label}",
                color=COLOURS[5 + number],
                marker="o",
                capsize=3,
            )
        panel.axhline(0.0, color="black", linewidth=0.8)
        panel.set_xscale("log", base=2)
        panel.set_xticks(batches, [str(batch) for batch in batches])
        style(panel, title=title, xlabel="rows of a step", ylabel="nats per token; below 0: AM is better")
    save(figure, path, legend_of=axes[0][0])


def draw_sensitivity(path: Path, tunings: Sequence[Tuning]) -> None:
    """Draw the validation loss of seed 0 over the learning rate, a panel for each cell."""
    columns = math.ceil(math.sqrt(len(tunings)))
    figure, axes = new_figure(math.ceil(len(tunings) / columns), columns, width=4.5, height=3.6)
    panels = [panel for row in axes for panel in row]
    for panel, tuning in zip(panels, tunings, strict=False):
        _plot_cell(panel, tuning, _compared(tuning))
    for panel in panels[len(tunings) :]:
        panel.set_visible(False)
    save(figure, path, legend_of=panels[0])


def draw_one_cell(path: Path, tuning: Tuning) -> None:
    """Draw one cell of `draw_sensitivity`, with the names of the methods and narrow enough for a phone."""
    figure, ((panel,),) = new_figure(1, 1, width=3.7, height=3.2)
    _plot_cell(panel, tuning, {str(method): method for method in _compared(tuning).values()})
    save(figure, path, legend_of=panel)


def _compared(tuning: Tuning) -> dict[str, Method | None]:
    return {
        "AdamW 0.9, warmup 5%": leader(tuning, CUSTOMARY),
        "best AdamW": leader(tuning, "AdamW"),
        "AM-AdamW 0.89, no warmup": leader(tuning, DEFAULT),
        "best AM-AdamW": leader(tuning, "AM-AdamW"),
        "best schedule-free AdamW": leader(tuning, "schedule-free AdamW"),
    }


def _plot_cell(panel: Axes, tuning: Tuning, lines: Mapping[str, Method | None]) -> None:
    """Plot a line for each method that the cell has. Lines of AM are bold, and those of untuned methods are dashed."""
    looks = []
    for number, (label, method) in enumerate(lines.items()):
        if method is None:
            continue
        look = {"marker": "o", "linewidth": 2.2} if method.kind == "am" else {"marker": ".", "linewidth": 1.1}
        dashes = "--" if method in (CUSTOMARY, DEFAULT) else "-"
        looks.append((label, method, look | {"linestyle": dashes, "color": COLOURS[number + 2]}))
    plot_rates(panel, tuning, looks, COARSE)
    lowest = min(tuning.best_loss(method) for _, method, _ in looks)
    panel.set_ylim(lowest - 0.05, lowest + _HEADROOM)
    style(panel, title=str(tuning.scale), xlabel="learning rate", ylabel=tuning.unit)


def draw_momentum(path: Path, tunings: Sequence[Tuning]) -> None:
    """Draw the mean beta_t of all tensors and the share of them at the cap over the run, a line for each cell."""
    figure, axes = new_figure(1, 2, width=5.0, height=3.6)
    for number, tuning in enumerate(tunings):
        config = trace_config(tuning)
        betas = np.array(tuning.ledger[config]["betas"])[1:]
        window = max(1, round(_WINDOW * tuning.scale.steps))
        for panel, values in zip(axes[0], (betas, at_cap(betas, config["method"]["beta1"])), strict=True):
            smooth = np.convolve(values.mean(axis=1), np.ones(window) / window, mode="valid")
            steps = np.arange(len(smooth)) + 1 + window
            panel.plot(steps, smooth, color=COLOURS[number + 2], label=f"{tuning.scale.batch_size} rows")
    style(axes[0][0], title="mean beta_t", xlabel="step")
    style(axes[0][1], title="share of tensors at the cap", xlabel="step")
    save(figure, path, legend_of=axes[0][0])
