"""The protocol of the vision study: a task, its learning rates tuned on one seed, and the comparison on five others."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from am_lightning.pretrain.runtime.errors import RecipeError, require
from recipes.studies.figures import COLOURS, new_figure, plot_rates, save, style
from recipes.studies.ledger import Config, Ledger
from recipes.studies.page import write_page
from recipes.studies.sweep import Sweep
from recipes.studies.vision.images import DATA
from recipes.studies.vision.networks import NETWORKS
from recipes.studies.vision.run import Method

MOMENTA = (0.9, 0.5, 0.8, 0.95)  # the customary one first; the others are for tuning
AM_SGD, AM_ADAMW = Method("am_sgd", 0.9), Method("am_adamw", 0.89)
METHODS = (
    *(Method(kind, momentum) for kind in ("sgd", "nesterov") for momentum in MOMENTA),
    AM_SGD,
    *(Method("adamw", momentum) for momentum in MOMENTA),
    AM_ADAMW,
)


@dataclass(frozen=True)
class Task:
    """A task of the vision study.

    Attributes:
        data: one of `images.DATA`.
        network: one of `networks.NETWORKS`.
        epochs: passes over the training images.
        batch_size: images of a step.
        sgd_weight_decay: coupled weight decay of SGD.
        adamw_weight_decay: decoupled weight decay of AdamW.
        sgd_rates, adamw_rates: grids of the peak learning rate, from which a cosine runs to zero.

    Raises:
        RecipeError: if a value is out of range.
    """

    data: str
    network: str
    epochs: int
    batch_size: int
    sgd_weight_decay: float
    adamw_weight_decay: float
    sgd_rates: list[float]
    adamw_rates: list[float]

    def __post_init__(self) -> None:
        require(self.data in DATA, "data", self.data, " or ".join(DATA))
        require(self.network in NETWORKS, "network", self.network, " or ".join(NETWORKS))
        for name in ("epochs", "batch_size"):
            value = getattr(self, name)
            require(type(value) is int and value >= 1, name, value, "a whole number >= 1")


def read_task(path: Path) -> Task:
    """Return the task in a YAML.

    Raises:
        RecipeError: if the file cannot be read, a key is unknown or missing, or a value is out of range.
    """
    try:
        return Task(**yaml.safe_load(path.read_text()))
    except (OSError, TypeError) as error:  # TypeError: the message names the key
        raise RecipeError(f"--task {path}: {error}") from error


def sweep_of(ledger: Ledger, task: Task, device: str) -> Sweep[Method]:
    """Return both stages on one task."""

    def config(method: Method, lr: float, seed: int) -> Config:
        return {"task": asdict(task), "method": asdict(method), "lr": lr, "seed": seed, "device": device}

    def rates(method: Method) -> list[float]:
        return task.sgd_rates if method.is_sgd else task.adamw_rates

    return Sweep(ledger, METHODS, rates, config, score="test_error", unit="test error, %")


def _look(method: Method) -> dict[str, Any]:
    ours = method in (AM_SGD, AM_ADAMW)
    colour = 6 if ours else MOMENTA.index(method.momentum) + (4 if method.kind == "nesterov" else 0)
    dashes = "--" if method.kind == "nesterov" else "-"
    width = 2.2 if ours else 1.1
    return {"color": COLOURS[colour], "linestyle": dashes, "linewidth": width, "marker": "o" if ours else "."}


def report(sweep: Sweep[Method], task: Task, folder: Path, command: str) -> str:
    """Write ``vision.md`` and its figure, and return the text of the page.

    Raises:
        RecipeError: if a stage is not complete.
    """
    folder.mkdir(parents=True, exist_ok=True)
    figure, (panels,) = new_figure(1, 2, width=5.0, height=5.0)
    for panel, is_sgd in zip(panels, (True, False), strict=True):
        methods = [method for method in METHODS if method.is_sgd is is_sgd]
        plot_rates(panel, sweep, [(str(m), m, _look(m)) for m in methods], sweep.rates(methods[0]))
        style(panel, xlabel="learning rate", ylabel=sweep.unit)
        panel.legend(fontsize=8, frameon=False)
    save(figure, folder / "vision-learning-rates.png")
    parts = [
        "## Test error in percent over the learning rate, one seed",
        sweep.sweep_table(),
        "![Test error over the learning rate](vision-learning-rates.png)",
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
