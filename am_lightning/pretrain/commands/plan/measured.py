"""Speed of GPUs: from the makers' data sheets, and as measured in training.

`python -m recipes.gpu.page` writes the measurements beside this module, and `plan` reads them.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import NamedTuple

from am_lightning.pretrain.runtime.errors import RecipeError

FILE = Path(__file__).with_name("measured.json")  # absent until something has been measured
ASSUMED_MFU = 0.4


class Gpu(NamedTuple):
    """Data sheet of a GPU: dense TFLOP/s in bfloat16 and in float32 (without TF32), and GB of memory."""

    bf16_tflops: float
    fp32_tflops: float
    memory_gb: float


GPUS = {
    "A100-40": Gpu(312, 19.5, 40),
    "A100": Gpu(312, 19.5, 80),
    "H100": Gpu(989, 67, 80),
    "H200": Gpu(989, 67, 141),
    "B200": Gpu(2250, 75, 180),
    "L40S": Gpu(362, 91.6, 48),
    "MI300X": Gpu(1307, 163, 192),
}


@dataclasses.dataclass(frozen=True)
class Measured:
    """Training that was timed."""

    device: str  # the GPU's name, as its driver reports it
    gpus: int  # number of GPUs that trained together
    recipe: str  # name of the model's recipe
    parameters: int  # number of the model's parameters
    precision: str  # Lightning's name of the precision
    compiled: bool  # True if the layers were compiled
    tflops: float  # operations of the model on one GPU, in 1e12 per second (6 N + 12 L h s per token)
    kind: str  # "training run" or "training steps"; the latter have no data loader, no validation and no checkpoint
    date: str  # ISO 8601, without the time of day

    @property
    def description(self) -> str:
        """For example "NVIDIA H200 (1b, 1 GPU; training steps, 2026-05-04)"."""
        gpus = "1 GPU" if self.gpus == 1 else f"{self.gpus} GPUs"
        return f"{self.device} ({self.recipe}, {gpus}; {self.kind}, {self.date})"


def nearest(gpu: str, parameters: int, precision: str, *, compiled: bool) -> Measured | None:
    """Return the measurement of the nearest size on `gpu`, a key of `GPUS`, in this precision; None if there is none.

    A training run is preferred to training steps.

    Raises:
        RecipeError: if the file is not a list of `Measured`.
    """
    try:
        found = [Measured(**each) for each in json.loads(FILE.read_text(encoding="utf-8"))]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise RecipeError(f"{FILE}: not what python -m recipes.gpu.page writes ({error}); remove it") from error
    same = [m for m in found if (gpu_of(m.device), m.precision, m.compiled) == (gpu, precision, compiled)]

    def distance(m: Measured) -> tuple[float, bool, int]:
        return abs(math.log(m.parameters / parameters)), m.kind != "training run", -m.gpus

    return min(same, key=distance, default=None)


def gpu_of(device: str) -> str | None:
    """Return the key of `GPUS` for a device's name: "A100-40" for "NVIDIA A100-SXM4-40GB"."""
    for gpu in sorted(GPUS, key=len, reverse=True):
        family, _, gigabytes = gpu.partition("-")
        if re.search(rf"\b{family}\b", device) and (not gigabytes or f"{gigabytes}GB" in device):
            return gpu
    return None
