"""The protocol of the vision study: tune the learning rate on one seed, compare on five fresh ones."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from am_lightning.recipes.studies.ledger import Config, Ledger
from am_lightning.recipes.studies.page import write_page
from am_lightning.recipes.studies.sweep import Sweep
from am_lightning.recipes.studies.vision.run import Method, run_config
from am_lightning.recipes.studies.vision.task import Task

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


def report(sweep: Sweep[Method], folder: Path) -> str:
    """Write ``vision.md`` into `folder`; its text. RecipeError: the sweep is not complete."""
    parts = [
        "## Test error in percent over the learning rate, one seed",
        sweep.sweep_table(),
        "## Fresh seeds, each method at its best learning rate",
        sweep.finalists_table(),
        "## Paired differences in percent points, 95 % intervals; negative: AM is better",
        sweep.differences_table((AM_SGD, AM_ADAMW)),
    ]
    protocol = "Seed 0 picks each method's learning rate, seeds 1 to 5 compare; error on the test images at the end."
    return write_page(folder / "vision.md", "Images", "python recipes/studies/vision.py", protocol, parts)
