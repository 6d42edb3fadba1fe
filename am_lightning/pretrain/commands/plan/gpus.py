"""GPUs that `plan` knows by name, from the makers' data sheets."""

from __future__ import annotations

import dataclasses

from am_lightning.pretrain.runtime.errors import RecipeError

ASSUMED_MFU = 0.4


@dataclasses.dataclass(frozen=True)
class Gpu:
    """From the makers' data sheets: dense TFLOP/s in bfloat16 and float32 (without TF32), GB of memory."""

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


def peak_tflops(gpu: str, precision: str) -> float:
    """Of one GPU in this precision.

    Raises:
        RecipeError: an unknown GPU.
    """
    if gpu not in GPUS:
        raise RecipeError(f"--gpu is {gpu!r}; known: {', '.join(GPUS)}. For another give --peak-tflops and --memory-gb")
    return GPUS[gpu].fp32_tflops if precision == "32-true" else GPUS[gpu].bf16_tflops
