"""The pictures of the GPU page: losses of training runs, and beta_t over layers and steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from am_lightning.pretrain.commands.report.events import Curve
from am_lightning.pretrain.commands.report.series import smooth
from recipes.studies.figures import COLOURS, INK, new_figure, save, style

DRAWN = ("AM 0.89", "AM 0.89 warmup")  # whose beta_t is shown
Results = dict[str, dict[str, Any]]


def draw_losses(page: Path, recipe: str, results: Results) -> str:
    """Running means of the training losses of all runs.

    Args:
        page: the file that shows the picture, which lies beside it.
        recipe: of the runs.
        results: the answers of parts, by name.

    Returns:
        The picture's file name.
    """
    figure, axes = new_figure(1, 1, width=8.0, height=4.4)
    panel = axes[0][0]
    names = sorted({result["run"]["name"] for result in results.values()})
    lowest = min(result["run"]["lr"] for result in results.values())
    starts = []
    for result in results.values():
        run = result["run"]
        losses = np.array([np.nan if loss is None else loss for loss in result["losses"]], float)
        mean = smooth(Curve(np.arange(1, len(losses) + 1), losses))
        starts.append(mean.values[len(mean.values) // 20])
        colour = COLOURS[names.index(run["name"]) % len(COLOURS)]
        label = f"{run['name']}, lr {run['lr']:g}" + (f", seed {run['seed']}" if run["seed"] else "")
        dashes = "-" if run["kind"] == "am" else "--"
        width = 1.6 if run["lr"] == lowest else 0.8
        panel.plot(mean.steps, mean.values, color=colour, linestyle=dashes, linewidth=width, label=label)
    panel.set_ylim(top=max(starts))
    style(panel, xlabel="step", ylabel="training loss, nats per token, running mean")
    path = page.with_name(f"{page.stem}-losses-{recipe}.png")
    save(figure, path, legend_of=panel)
    return path.name


def draw_betas(page: Path, recipe: str, results: Results) -> list[tuple[str, str]]:
    """Of the first run of each of ``DRAWN``: (run's name, the picture's file name); see `draw_losses`."""
    drawn: dict[str, str] = {}
    for result in results.values():
        run, betas = result["run"], result.get("beta_t")
        if betas is None or run["name"] not in DRAWN or run["name"] in drawn:
            continue
        values = np.array([[np.nan if v is None else v for v in row] for row in betas["values"]], float)
        figure, axes = new_figure(1, 1, width=9.0, height=0.3 * len(betas["rows"]) + 1.2)
        panel = axes[0][0]
        places = np.arange(len(betas["rows"]) + 1)
        mesh = panel.pcolormesh(betas["edges"], places, values, cmap="YlGnBu_r", vmin=0.0, rasterized=True)
        panel.set_yticks(places[:-1] + 0.5, betas["rows"])
        panel.invert_yaxis()
        style(panel, title=f"beta_t of {run['name']}, lr {run['lr']:g}, {recipe}", xlabel="step")
        panel.grid(False)
        figure.colorbar(mesh, ax=panel, pad=0.01, aspect=20).ax.tick_params(labelsize=8, colors=INK)
        path = page.with_name(f"{page.stem}-beta-{recipe}-{len(drawn)}.png")
        save(figure, path)
        drawn[run["name"]] = path.name
    return list(drawn.items())
