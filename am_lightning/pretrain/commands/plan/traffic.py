"""Bytes that one GPU sends in a step, by purpose.

A ring over n GPUs sends (n - 1) / n of the payload for an all-gather or a reduce-scatter and twice that for an
all-reduce (Patarasuk & Yuan 2009), which is also what NCCL's other algorithms send within a factor close to 1.
"""

from __future__ import annotations

import dataclasses

from am_lightning.distributed.layout import message_bytes
from am_lightning.pretrain.commands.plan.layout import ParallelPlan
from am_lightning.pretrain.model.shape import LlamaShape, count_parameters, count_tensors


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes sent by one GPU in a step."""

    data: dict[str, int]  # purpose -> bytes, between the groups that see different rows
    tensor: dict[str, int]  # purpose -> bytes, between the GPUs that share a layer
    beta: int  # the reduction of all beta_t: four float64 per parameter tensor (docs/reduce.md)

    @property
    def total(self) -> int:
        return sum(self.data.values()) + sum(self.tensor.values()) + self.beta


def traffic_of(shape: LlamaShape, layout: ParallelPlan, *, checkpointing: bool, backend: str = "nccl") -> Traffic:
    """Return the bytes that one GPU sends in a step.

    Args:
        checkpointing: True if activation checkpointing is on; its recomputation gathers again.
        backend: "nccl", or "gloo", whose reduce-scatter is an all-reduce.
    """
    beta = _all_reduce(message_bytes(count_tensors(shape)), layout.gpus)
    tensor = _between_layers(shape, layout, checkpointing, backend) if layout.tensor > 1 else {}
    data = _gradients_and_weights(shape, layout, backend) if layout.data > 1 else {}
    return Traffic(data, tensor, beta)


def _gradients_and_weights(shape: LlamaShape, layout: ParallelPlan, backend: str) -> dict[str, int]:
    n, t, micro, c = layout.data, layout.tensor, layout.accumulate, layout.compute_bytes
    norms = (2 * shape.num_layers + 1) * shape.hidden_size
    parameters = (count_parameters(shape) - norms) // t + norms
    vocabulary = (1 if shape.tie_word_embeddings else 2) * shape.vocab_size * shape.hidden_size // t
    layers = parameters - vocabulary - shape.hidden_size
    if layout.kind == "fsdp" or layout.stage == 3:
        # FSDP gathers a layer again for the backward pass, and keeps all other parameters gathered.
        again, width = (layers, 4) if layout.kind == "fsdp" else (parameters, c)
        return {
            "all-gather of weights": micro * _all_gather(c * (parameters + again), n),
            "reduce-scatter of gradients": micro * _reduce_scatter(width * parameters, n, backend),
        }
    if layout.stage:
        times = micro if layout.stage == 2 else 1
        return {
            "reduce-scatter of gradients": times * _reduce_scatter(c * parameters, n, backend),
            "all-gather of weights": _all_gather(c * parameters, n),
        }
    return {"all-reduce of gradients": _all_reduce(layout.weight_bytes * parameters, n)}


def _between_layers(shape: LlamaShape, layout: ParallelPlan, checkpointing: bool, backend: str) -> dict[str, int]:
    """Sequence parallel gathers the residual stream before attention and before the MLP and scatters it after them,
    and the reverse in the backward pass. Recomputing the forward repeats its gathers and the scatter after attention;
    the layer's output is not needed. Embedding and head have half of it."""
    t = layout.tensor
    stream = layout.rows * shape.seq_len * shape.hidden_size * layout.compute_bytes
    gather, scatter = _all_gather(stream, t), _reduce_scatter(stream, t, backend)
    gathers = shape.num_layers * (6 if checkpointing else 4)
    scatters = shape.num_layers * (5 if checkpointing else 4)
    outside = 2  # forward and backward of embedding (scatter, gather) and head (gather, scatter)
    norms = _all_reduce((2 * shape.num_layers + 1) * shape.hidden_size * layout.compute_bytes, t)
    return {
        "all-gather of activations": layout.accumulate * (gathers + outside) * gather,
        "reduce-scatter of activations": layout.accumulate * (scatters + outside) * scatter,
        "all-reduce of norms' gradients": layout.accumulate * norms,
    }


def _all_gather(payload: int, n: int) -> int:
    return payload * (n - 1) // n


def _reduce_scatter(payload: int, n: int, backend: str) -> int:
    return _all_reduce(payload, n) if backend == "gloo" else payload * (n - 1) // n


def _all_reduce(payload: int, n: int) -> int:
    return 2 * payload * (n - 1) // n
