"""What is trained in the vision study: a YAML of data, network, length and grids."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import yaml

from am_lightning.pretrain.runtime.errors import RecipeError, require
from recipes.studies.vision.images import DATA
from recipes.studies.vision.networks import NETWORKS


@dataclasses.dataclass(frozen=True)
class Task:
    """A task of the vision study.

    Attributes:
        data: one of `images.DATA`.
        network: one of `networks.NETWORKS`.
        epochs: passes over the training images.
        batch_size: images of a step.
        sgd_weight_decay: coupled, as in SGD.
        adamw_weight_decay: decoupled.
        sgd_rates, adamw_rates: grids of the peak learning rate, of which a cosine runs to zero.

    Raises:
        RecipeError: a value is out of range.
    """

    data: str
    network: str
    epochs: int
    batch_size: int
    sgd_weight_decay: float
    adamw_weight_decay: float
    sgd_rates: tuple[float, ...]
    adamw_rates: tuple[float, ...]

    def __post_init__(self) -> None:
        require(self.data in DATA, "data", self.data, " or ".join(DATA))
        require(self.network in NETWORKS, "network", self.network, " or ".join(NETWORKS))
        for name in ("epochs", "batch_size"):
            value = getattr(self, name)
            require(type(value) is int and value >= 1, name, value, "a whole number >= 1")


def read_task(path: Path) -> Task:
    """The task in a YAML.

    Raises:
        RecipeError: the file is not there, a key is unknown or missing, or a value does not fit.
    """
    try:
        values: Any = yaml.safe_load(path.read_text())
    except OSError as error:
        raise RecipeError(f"--task {path}: {error.strerror}") from error
    fields = {field.name for field in dataclasses.fields(Task)}
    given = set(values) if isinstance(values, dict) else set()
    if given != fields:
        wrong = sorted(given - fields), sorted(fields - given)
        raise RecipeError(f"--task {path}: unknown keys {wrong[0]}, missing keys {wrong[1]}")
    fitting: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
    return Task(**fitting)
