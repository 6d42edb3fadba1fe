"""How fast training was on a GPU: `python -m recipes.gpu.page` writes it beside this module, and `plan` reads it."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path

from am_lightning.pretrain.commands.plan.gpus import GPUS
from am_lightning.pretrain.runtime.errors import RecipeError

FILE = Path(__file__).with_name("measured.json")  # absent until something has been measured


@dataclasses.dataclass(frozen=True)
class Measured:
    """Training that was timed.

    Attributes:
        device: name of the GPU, as its driver has it.
        gpus: how many trained together.
        recipe: name of the model's recipe.
        parameters: number of the model's parameters.
        precision: Lightning's name of it.
        compiled: whether layers were compiled.
        tflops: operations of the model on one GPU, in 1e12 per second (6 N + 12 L h s for a token).
        kind: "training run" or "training steps"; the latter have no data loader, no validation and no checkpoint.
        date: ISO 8601, without the time of day.
    """

    device: str
    gpus: int
    recipe: str
    parameters: int
    precision: str
    compiled: bool
    tflops: float
    kind: str
    date: str

    @property
    def description(self) -> str:
        """For example "NVIDIA H200 (1b, 1 GPU; training steps, 2026-05-04)"."""
        gpus = "1 GPU" if self.gpus == 1 else f"{self.gpus} GPUs"
        return f"{self.device} ({self.recipe}, {gpus}; {self.kind}, {self.date})"


def write_measured(found: list[Measured], path: Path) -> None:
    """Write the file that `read_measured` reads; an empty list removes it."""
    if found:
        path.write_text(json.dumps([dataclasses.asdict(each) for each in found], indent=1) + "\n", encoding="utf-8")
    else:
        path.unlink(missing_ok=True)


def read_measured(path: Path) -> list[Measured]:
    """What the file holds; nothing where there is none.

    Raises:
        RecipeError: `write_measured` did not write it.
    """
    try:
        return [Measured(**each) for each in json.loads(path.read_text(encoding="utf-8"))]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError) as error:
        raise RecipeError(f"{path}: not what python -m recipes.gpu.page writes ({error}); remove it") from error


def nearest(found: list[Measured], gpu: str, parameters: int, precision: str, *, compiled: bool) -> Measured | None:
    """The one whose size is nearest, on this GPU in this precision; a training run goes before training steps.

    Args:
        gpu: a key of `GPUS`.
    """
    same = [m for m in found if (gpu_of(m.device), m.precision, m.compiled) == (gpu, precision, compiled)]
    key = {id(m): (abs(math.log(m.parameters / parameters)), m.kind != "training run", -m.gpus) for m in same}
    return min(same, key=lambda m: key[id(m)], default=None)


def gpu_of(device: str) -> str | None:
    """The key of `GPUS` that stands for a device's name: "NVIDIA A100-SXM4-40GB" is "A100-40"."""
    fitting = []
    for gpu in GPUS:
        family, _, gigabytes = gpu.partition("-")
        if re.search(rf"\b{family}\b", device) and (not gigabytes or f"{gigabytes}GB" in device):
            fitting.append(gpu)
    return max(fitting, key=len, default=None)
