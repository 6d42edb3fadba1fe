"""The protocol of the vision study: tune the learning rate on one seed, compare on five fresh ones."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from recipes.studies.figures import COLOURS
from recipes.studies.ledger import Config, Ledger
from recipes.studies.page import figure, write_page
from recipes.studies.rates_figure import draw_rates
from recipes.studies.sweep import Sweep
from recipes.studies.vision.run import Method, run_config
from recipes.studies.vision.task import Task

MOMENTA = (0.9, 0.5, 0.8, 0.95)  # the first is the customary one, the others are there to be tuned over
AM_SGD, AM_ADAMW = Method("am_sgd", 0.9), Method("am_adamw", 0.89)
METHODS = (
    *(Method(kind, momentum) for kind in ("sgd", "nesterov") for momentum in MOMENTA),
    AM_SGD,
    *(Method("adamw", momentum) for momentum in MOMENTA),
    AM_ADAMW,
)


def sweep_of(ledger: Ledger, task: Task, device: str) -> Sweep[Method]:
    """Both stages on one task."""
    as_kept = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(task).items()}

    def config(method: Method, lr: float, seed: int) -> Config:
        return run_config(as_kept, method, lr, seed, device)

    def rates(method: Method) -> tuple[float, ...]:
        return task.sgd_rates if method.is_sgd else task.adamw_rates

    return Sweep(ledger, METHODS, rates, config, score="test_error", unit="test error, %")


def _look(method: Method) -> dict[str, Any]:
    ours = method in (AM_SGD, AM_ADAMW)
    colour = 6 if ours else MOMENTA.index(method.momentum) + (4 if method.kind == "nesterov" else 0)
    dashes = "--" if method.kind == "nesterov" else "-"
    width = 2.2 if ours else 1.1
    return {"color": COLOURS[colour], "linestyle": dashes, "linewidth": width, "marker": "o" if ours else "."}


def report(sweep: Sweep[Method], task: Task, folder: Path, command: str) -> str:
    """Write ``vision.md`` and its figure; its text. RecipeError: the sweep is not complete."""
    folder.mkdir(parents=True, exist_ok=True)
    panels = [[method for method in METHODS if method.is_sgd is is_sgd] for is_sgd in (True, False)]
    draw_rates(folder / "vision-learning-rates.png", sweep, panels, _look)
    parts = [
        "## Test error in percent over the learning rate, one seed",
        sweep.sweep_table(),
        figure("vision-learning-rates.png", "Test error over the learning rate"),
        "## Fresh seeds, each method at its best learning rate",
        sweep.finalists_table(),
        "## Paired differences in percent points, 95 % intervals; negative: AM is better",
        sweep.differences_table((AM_SGD, AM_ADAMW)),
    ]
    protocol = (
        f"{task.data}, {task.network}, {task.epochs} epochs of batches of {task.batch_size}. Seed 0 picks each method's"
        " learning rate, the lower one of a tie, seeds 1 to 5 compare; error on the test images at the end. There is no"
        " third part of the data: seed 0 is scored on the same test images."
    )
    return write_page(folder / "vision.md", "Images", command, sweep.ledger.made(), protocol, parts)
