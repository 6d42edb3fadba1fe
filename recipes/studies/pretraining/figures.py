"""Pictures of the warmup study: sensitivity to the learning rate, loss curves, and the heatmap of beta_t."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from recipes.studies.figures import COLOURS, INK, new_figure, save, style
from recipes.studies.ledger import Ledger
from recipes.studies.pretraining.methods import Method
from recipes.studies.pretraining.momentum import layer_means, traces
from recipes.studies.pretraining.results import mean_curve
from recipes.studies.pretraining.stages import (
    AM,
    FEW,
    METHODS,
    Scale,
    sweep_of,
)
from recipes.studies.rates_figure import draw_rates

_WINDOW = 20  # steps that the loss curves are smoothed over


def draw_sweep(path: Path, ledger: Ledger, scale: Scale) -> None:
    """Validation loss over the learning rate; AM bold, a colour for each method with and without warmup."""
    without_warmup = list(dict.fromkeys(replace(method, warmup=0.0) for method in METHODS))

    def look(method: Method) -> dict[str, Any]:
        ours = method.kind == "am"
        return {
            "linestyle": "--" if method.warmup else "-",
            "marker": "o" if ours else ".",
            "color": COLOURS[without_warmup.index(replace(method, warmup=0.0))],
            "linewidth": 2.2 if ours else 1.1,
        }

    draw_rates(path, sweep_of(ledger, scale), [METHODS], look, title="nats per token; dashed: with warmup")


def draw_curves(path: Path, ledger: Ledger, scale: Scale) -> None:
    """Training loss of some finalists: mean over the fresh seeds with a band of one standard deviation."""
    figure, axes = new_figure(1, 1, width=7.5, height=4.2)
    panel = axes[0][0]
    sweep = sweep_of(ledger, scale)
    for number, method in enumerate(FEW):
        lr = sweep.best_rate(method)
        runs = [scale.config(method, lr, seed) for seed in sweep.fresh_seeds]
        mean, spread = mean_curve(ledger, runs, _WINDOW)
        steps = np.arange(len(mean)) + _WINDOW
        colour = COLOURS[len(FEW) - number]
        panel.plot(steps, mean, color=colour, linewidth=1.6, label=f"{method}, lr {lr:g}")
        panel.fill_between(steps, mean - spread, mean + spread, color=colour, alpha=0.15, linewidth=0)
    panel.set_ylim(top=4.0)
    style(panel, xlabel="step", ylabel=f"training loss, mean of {_WINDOW} steps")
    save(figure, path, legend_of=panel)


def draw_heatmap(path: Path, ledger: Ledger, scale: Scale) -> None:
    """beta_t of AM, layers x steps, mean over seeds and over a layer's tensors."""
    names, betas = traces(ledger, scale, AM)
    layers, means = layer_means(names, betas)
    figure, axes = new_figure(1, 1, width=9.0, height=0.35 * len(layers) + 1.2)
    panel = axes[0][0]
    steps = np.arange(means.shape[1] + 1) + 1.5
    mesh = panel.pcolormesh(steps, np.arange(len(layers) + 1), means, cmap="YlGnBu_r", rasterized=True)
    panel.set_yticks(np.arange(len(layers)) + 0.5, layers)
    panel.invert_yaxis()
    style(panel, title=f"beta_t of {AM}, mean of {len(betas)} seeds", xlabel="step")
    panel.grid(False)
    bar = figure.colorbar(mesh, ax=panel, pad=0.01, aspect=20)
    bar.ax.tick_params(labelsize=8, colors=INK)
    save(figure, path)
