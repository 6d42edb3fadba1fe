"""The page of the warmup study: tables and figures of the stages that are complete."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from recipes.studies.figures import COLOURS, draw_heatmap, new_figure, plot_rates, save, style
from recipes.studies.page import write_page
from recipes.studies.pretraining import results
from recipes.studies.pretraining.methods import Method
from recipes.studies.pretraining.stages import AM, AM_LOW, AM_WARM, FEW, LEARNING_RATES, METHODS, Study

_WINDOW = 20  # steps over which the loss curves are smoothed


def _draw_sweep(path: Path, study: Study) -> None:
    """Draw the validation loss over the learning rate: AM in bold, a colour for each method with and without warmup."""
    without_warmup = list(dict.fromkeys(replace(method, warmup=0.0) for method in METHODS))

    def look(method: Method) -> dict[str, Any]:
        ours = method.kind == "am"
        return {
            "linestyle": "--" if method.warmup else "-",
            "marker": "o" if ours else ".",
            "color": COLOURS[without_warmup.index(replace(method, warmup=0.0))],
            "linewidth": 2.2 if ours else 1.1,
        }

    figure, ((panel,),) = new_figure(1, 1, width=7.5, height=5.0)
    plot_rates(panel, study, [(str(method), method, look(method)) for method in METHODS], LEARNING_RATES)
    style(panel, title="nats per token; dashed: with warmup", xlabel="learning rate", ylabel=study.unit)
    save(figure, path, legend_of=panel)


def _draw_curves(path: Path, study: Study) -> None:
    """Draw the training loss of some finalists: mean over the fresh seeds with a band of one standard deviation."""
    figure, ((panel,),) = new_figure(1, 1, width=7.5, height=4.2)
    for number, method in enumerate(FEW):
        lr = study.best_rate(method)
        runs = [study.config(method, lr, seed) for seed in study.fresh_seeds]
        mean, spread = results.mean_curve(study.ledger, runs, _WINDOW)
        steps = np.arange(len(mean)) + _WINDOW
        colour = COLOURS[len(FEW) - number]
        panel.plot(steps, mean, color=colour, linewidth=1.6, label=f"{method}, lr {lr:g}")
        panel.fill_between(steps, mean - spread, mean + spread, color=colour, alpha=0.15, linewidth=0)
    panel.set_ylim(top=4.0)
    style(panel, xlabel="step", ylabel=f"training loss, mean of {_WINDOW} steps")
    save(figure, path, legend_of=panel)


def _draw_betas(path: Path, study: Study) -> None:
    """Draw beta_t of AM, layers x steps, mean over seeds and over a layer's tensors."""
    names, betas = results.traces(study, AM)
    layers, means = results.layer_means(names, betas)
    title = f"beta_t of {AM}, mean of {len(betas)} seeds"
    draw_heatmap(path, layers, np.arange(means.shape[1] + 1) + 1.5, means, title)


_TABLES: dict[str, list[tuple[str, Callable[[Study], str]]]] = {
    "sweep": [("Validation loss over the learning rate, one seed", Study.sweep_table)],
    "finalists": [
        ("Fresh seeds, each method at its best learning rate", Study.finalists_table),
        (
            "Paired differences with 95-percent intervals; negative: AM is better",
            lambda study: study.differences_table((AM, AM_LOW, *AM_WARM)),
        ),
        ("Spikes of the training loss", results.spikes_table),
    ],
    "batch": [("A larger batch", results.batch_table)],
    "long": [("A longer run", results.long_table)],
    "beta": [
        ("beta_t by kind of layer", results.kinds_table),
        ("The tensors that dip most", results.dips_table),
        ("Ablations", results.ablations_table),
        ("beta_t and the batch", results.batch_effect),
    ],
}
_FIGURES = {
    "sweep": ("warmup-learning-rates.png", _draw_sweep, "Validation loss over the learning rate"),
    "finalists": ("warmup-curves.png", _draw_curves, "Training loss over the steps"),
    "beta": ("beta-heatmap.png", _draw_betas, "beta_t, layers by steps"),
}


def report(study: Study, folder: Path, command: str) -> str:
    """Write ``warmup.md`` and its figures into `folder`, and return the text of the page."""
    parts = []
    for stage, tables in _TABLES.items():
        if not study.has_all(study.configs(stage)):
            continue
        parts += [f"## {title}\n\n{table(study)}" for title, table in tables]
        if stage in _FIGURES:
            name, draw, caption = _FIGURES[stage]
            folder.mkdir(parents=True, exist_ok=True)
            draw(folder / name, study)
            parts.append(f"![{caption}]({name})")
    scale = study.scale
    protocol = (
        f"Recipe {scale.recipe}, {scale.steps} steps of {scale.batch_size} rows on {scale.device}. Seed 0 picks each"
        " method's learning rate; seeds 1 to 5 (1 to 3 for the longer run, 0 and 1 for the larger batch) compare."
        " Losses are nats per token on held-out rows after the last step."
    )
    title = "Warmup, learning rates and momentum"
    return write_page(folder / "warmup.md", title, command, study.ledger.made(), protocol, parts)
