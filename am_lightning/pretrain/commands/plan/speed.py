"""Time of a run at a stated share of the hardware's peak, and of its communication at stated bandwidths."""

from __future__ import annotations

import dataclasses

from am_lightning.pretrain.commands.plan.layout import ParallelPlan
from am_lightning.pretrain.commands.plan.traffic import Traffic
from am_lightning.pretrain.model.shape import LlamaShape, flops_per_token


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
