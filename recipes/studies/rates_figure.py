"""The score of every method over its learning rates, as a picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from recipes.studies.figures import new_figure, save, style
from recipes.studies.sweep import Sweep

M = TypeVar("M")


def draw_rates(
    path: Path, sweep: Sweep[M], panels: Sequence[Sequence[M]], look: Callable[[M], dict[str, Any]], title: str = ""
) -> None:
    """One line for each method of the sweep's seed.

    Args:
        path: of the PNG.
        sweep: with its first stage complete.
        panels: the methods of each panel, side by side; a panel has one grid of learning rates.
        look: matplotlib's keywords for a method's line.
        title: of the panels.
    """
    figure, axes = new_figure(1, len(panels), width=7.5 if len(panels) == 1 else 5.0, height=5.0)
    for panel, methods in zip(axes[0], panels, strict=True):
        for method in methods:
            rates = sweep.rates(method)
            values = [sweep.value(sweep.config(method, lr, sweep.sweep_seed)) for lr in rates]
            panel.plot(rates, values, label=str(method), **look(method))
        panel.set_xscale("log", base=2)
        panel.set_xticks(rates, [f"{lr:g}" for lr in rates])
        style(panel, title=title, xlabel="learning rate", ylabel=sweep.unit)
        if len(panels) > 1:
            panel.legend(fontsize=8, frameon=False)
    save(figure, path, legend_of=axes[0][0] if len(panels) == 1 else None)
