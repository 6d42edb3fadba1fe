"""Bytes that one GPU sends in a step, by what they are for.

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
    """Bytes sent by one GPU in a step.

    Attributes:
        data: between the groups that see other rows: purpose -> bytes.
        tensor: between the GPUs that share a layer: purpose -> bytes.
        beta: the reduction of all beta_t: four float64 for every parameter tensor (docs/reduce.md).
    """

    data: dict[str, int]
    tensor: dict[str, int]
    beta: int

    @property
    def total(self) -> int:
        return sum(self.data.values()) + sum(self.tensor.values()) + self.beta


def traffic_of(shape: LlamaShape, layout: ParallelPlan, *, checkpointing: bool, backend: str = "nccl") -> Traffic:
    """Bytes sent by one GPU in a step.

    Args:
        checkpointing: activation checkpointing is on; its recomputation gathers again.
        backend: "nccl", or "gloo", whose reduce-scatter is an all-reduce.
    """
    beta = _all_reduce(message_bytes(count_tensors(shape)), layout.gpus)
    tensor = _between_layers(shape, layout, checkpointing, backend) if layout.tensor > 1 else {}
    return Traffic(_gradients_and_weights(shape, layout, backend), tensor, beta)


def _gradients_and_weights(shape: LlamaShape, layout: ParallelPlan, backend: str) -> dict[str, int]:
    n, t, micro = layout.data, layout.tensor, layout.accumulate
    w, c = layout.weight_bytes, layout.compute_bytes
    norms = (2 * shape.num_layers + 1) * shape.hidden_size
    parameters = (count_parameters(shape) - norms) // t + norms
    vocabulary = (1 if shape.tie_word_embeddings else 2) * shape.vocab_size * shape.hidden_size // t
    layers = parameters - vocabulary - shape.hidden_size
    if n == 1:
        return {}
    if layout.kind == "fsdp":
        return {
            # What is outside of layers stays gathered; layers are gathered again for the backward pass.
            "all-gather of weights": micro * _all_gather(c * (parameters + layers), n),
            "reduce-scatter of gradients": micro * _reduce_scatter(4 * parameters, n, backend),
        }
    if layout.kind == "zero" and layout.stage == 3:
        return {
            "all-gather of weights": micro * _all_gather(2 * c * parameters, n),
            "reduce-scatter of gradients": micro * _reduce_scatter(c * parameters, n, backend),
        }
    if layout.kind == "zero" and layout.stage:
        times = micro if layout.stage == 2 else 1
        return {
            "reduce-scatter of gradients": times * _reduce_scatter(c * parameters, n, backend),
            "all-gather of weights": _all_gather(c * parameters, n),
        }
    return {"all-reduce of gradients": _all_reduce(w * parameters, n)}


def _between_layers(shape: LlamaShape, layout: ParallelPlan, checkpointing: bool, backend: str) -> dict[str, int]:
    """Sequence parallel: around attention and around the MLP a gather and a scatter of the residual stream, backward
    the same the other way round; where the forward is recomputed, its gathers again and the scatter after attention,
    because the layer's output is not needed. Embedding and head have half of it."""
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
