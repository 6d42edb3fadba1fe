"""Time of a run at a stated share of the hardware's peak, and of its communication at stated bandwidths."""

from __future__ import annotations

import dataclasses

from am_lightning.pretrain.commands.plan.layout import ParallelPlan
from am_lightning.pretrain.commands.plan.traffic import Traffic
from am_lightning.pretrain.model.network import LlamaShape, flops_per_token
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


@dataclasses.dataclass(frozen=True)
class Speed:
    """
    Attributes:
        tokens_per_step, tokens_per_second: over all GPUs.
        step_seconds: computation of a step at the stated MFU.
        communication_seconds: sending a step's bytes, where nothing hides it behind the computation.
        days: of the whole run, without validations.
    """

    tokens_per_step: int
    tokens_per_second: float
    step_seconds: float
    communication_seconds: float
    days: float


def peak_tflops(gpu: str, precision: str) -> float:
    """Of one GPU in this precision.

    Raises:
        RecipeError: an unknown GPU.
    """
    if gpu not in GPUS:
        raise RecipeError(f"--gpu is {gpu!r}; known: {', '.join(GPUS)}. For another give --peak-tflops and --memory-gb")
    return GPUS[gpu].fp32_tflops if precision == "32-true" else GPUS[gpu].bf16_tflops


def speed_of(
    shape: LlamaShape,
    layout: ParallelPlan,
    traffic: Traffic,
    *,
    steps: int,
    tflops: float,
    mfu: float,
    node_bandwidth: float,
    network_bandwidth: float,
) -> Speed:
    """
    Args:
        steps: optimizer steps of the run.
        tflops: peak of one GPU, in 1e12 operations per second.
        mfu: model FLOPs utilisation (Chowdhery et al. 2022), a share of the peak; 6 N + 12 L h s for a token.
        node_bandwidth, network_bandwidth: GB/s that a GPU sends within its node, and to other nodes.
    """
    tokens = layout.data * layout.accumulate * layout.rows * shape.seq_len
    per_second = layout.gpus * tflops * 1e12 * mfu / flops_per_token(shape)
    between = network_bandwidth if layout.nodes > 1 else node_bandwidth
    within = node_bandwidth if layout.tensor <= layout.gpus_per_node else network_bandwidth
    sending = sum(traffic.data.values()) / (between * 1e9) + sum(traffic.tensor.values()) / (within * 1e9)
    step = tokens / per_second
    return Speed(tokens, per_second, step, sending, steps * step / 86400)
