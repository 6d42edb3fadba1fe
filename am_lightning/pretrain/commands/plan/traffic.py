"""Bytes that one GPU sends in a step, by purpose.

A ring over n GPUs sends (n - 1) / n of the payload for an all-gather or a reduce-scatter and twice that for an
all-reduce (Patarasuk & Yuan 2009), which is also what NCCL's other algorithms send within a factor close to 1.
"""

from __future__ import annotations

import dataclasses

from am_lightning.distributed.layout import message_bytes
from am_lightning.pretrain.commands.plan.layout import ParallelPlan, Weights
from am_lightning.pretrain.model.shape import LlamaShape, count_tensors


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes sent by one GPU in a step."""

    data: dict[str, int]  # purpose -> bytes, between the groups that see different rows
    tensor: dict[str, int]  # purpose -> bytes, between the GPUs that share a layer
    beta: int  # the reduction of all beta_t: four float64 per parameter tensor (docs/reduce.md)

    @property
    def total(self) -> int:
        return sum(self.data.values()) + sum(self.tensor.values()) + self.beta


def traffic_of(shape: LlamaShape, layout: ParallelPlan, *, checkpointing: bool) -> Traffic:
    """Return the bytes that one GPU sends in a step. The recomputation of activation checkpointing gathers again."""
    beta = _ring(2 * message_bytes(count_tensors(shape)), layout.gpus)
    tensor = _between_layers(shape, layout, checkpointing) if layout.tensor > 1 else {}
    data = _gradients_and_weights(Weights.of(shape, layout.tensor), layout) if layout.data > 1 else {}
    return Traffic(data, tensor, beta)


def _gradients_and_weights(weights: Weights, layout: ParallelPlan) -> dict[str, int]:
    n, micro, c = layout.data, layout.accumulate, layout.compute_bytes
    if layout.kind == "fsdp" or layout.stage == 3:
        # FSDP gathers a layer again for the backward pass, and keeps all other parameters gathered.
        again, width = (weights.all - weights.outside, 4) if layout.kind == "fsdp" else (weights.all, c)
        return {
            "all-gather of weights": micro * _ring(c * (weights.all + again), n),
            "reduce-scatter of gradients": micro * _ring(width * weights.all, n),
        }
    if layout.stage:
        times = micro if layout.stage == 2 else 1
        return {
            "reduce-scatter of gradients": times * _ring(c * weights.all, n),
            "all-gather of weights": _ring(c * weights.all, n),
        }
    return {"all-reduce of gradients": _ring(2 * layout.weight_bytes * weights.all, n)}


def _between_layers(shape: LlamaShape, layout: ParallelPlan, checkpointing: bool) -> dict[str, int]:
    """Sequence parallel gathers the residual stream before attention and before the MLP and scatters it after them,
    and the reverse in the backward pass. Recomputing the forward repeats its gathers and the scatter after attention;
    the layer's output is not needed. Embedding and head have half of it."""
    t = layout.tensor
    stream = _ring(layout.rows * shape.seq_len * shape.hidden_size * layout.compute_bytes, t)
    gathers = shape.num_layers * (6 if checkpointing else 4)
    scatters = shape.num_layers * (5 if checkpointing else 4)
    outside = 2  # forward and backward of embedding (scatter, gather) and head (gather, scatter)
    norms = _ring(2 * (2 * shape.num_layers + 1) * shape.hidden_size * layout.compute_bytes, t)
    return {
        "all-gather of activations": layout.accumulate * (gathers + outside) * stream,
        "reduce-scatter of activations": layout.accumulate * (scatters + outside) * stream,
        "all-reduce of norms' gradients": layout.accumulate * norms,
    }


def _ring(payload: int, n: int) -> int:
    """Return the bytes that each of n GPUs sends in an all-gather or a reduce-scatter: half of an all-reduce."""
    return payload * (n - 1) // n
