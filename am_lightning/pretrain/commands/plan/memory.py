"""Memory of one GPU during a step, by component, at the moments when it can be largest.

It is counted from what transformers' Llama and torch keep; `tests/recipes/test_plan_reality.py` measures it. The CUDA
context, NCCL's buffers and fragmentation are not counted, but estimated by `RESERVE`.
"""

from __future__ import annotations

import dataclasses

from am_lightning.pretrain.commands.plan.layout import ParallelPlan, Weights
from am_lightning.pretrain.model.shape import LlamaShape

RESERVE = 2 << 30  # context, NCCL and fragmentation: a guess, which the plan states
BUCKET = 4 << 20  # elements in a chunk of the optimizer's foreach passes, which have up to 8 float32 temporaries
ZERO_BUCKET = 200_000_000  # elements; Lightning's reduce_bucket_size

# Components that are held all the time, and moment -> further components; see `Memory`.
_Parts = tuple[dict[str, int], dict[str, dict[str, int]]]


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one GPU."""

    held: dict[str, int]  # component -> bytes that are held all the time: weights, moments, buffers
    moments: dict[str, dict[str, int]]  # moment of a step -> component -> further bytes

    def total(self, moment: str) -> int:
        return sum(self.held.values()) + sum(self.moments[moment].values())

    @property
    def peak(self) -> str:
        """The moment with the largest total."""
        return max(self.moments, key=self.total)


def memory_of(shape: LlamaShape, layout: ParallelPlan, *, checkpointing: bool) -> Memory:
    """Return the memory of a step of training, with activation checkpointing or without it."""
    weights = Weights.of(shape, layout.tensor)
    held, moments = {"fsdp": _sharded, "zero": _zero}.get(layout.kind, _replicated)(shape, weights, layout)
    tokens = layout.rows * shape.seq_len
    layer, layer_input, head, loss = (tokens * size for size in _token_bytes(shape, layout))
    activations = shape.num_layers * (layer_input if checkpointing else layer) + head
    moments["loss"] |= {"activations": activations, "loss": loss}
    moments["backward"]["activations"] = activations + (layer if checkpointing else 0)
    whole = layout.kind in ("single", "ddp") or (layout.kind == "zero" and not layout.stage)
    scratch = 8 * 4 * min(BUCKET, weights.all if whole else weights.all // layout.data)
    if layout.kind == "zero":
        scratch += 4 * weights.all // layout.data
    moments["optimizer"]["optimizer scratch"] = scratch
    return Memory(held, moments)


def _token_bytes(shape: LlamaShape, layout: ParallelPlan) -> tuple[int, int, int, int]:
    """Return the bytes that one GPU keeps for a token: of a decoder layer, of its input, of the head, and of the loss.

    A layer keeps, in elements (width h, keys k, MLP m), from transformers' LlamaDecoderLayer and fused attention:
    2 norms: input, normalized input, output: 6 h; attention: queries, output 2 h, keys and values 2 k, a float32 for
    each head; MLP: gate, its SiLU, up, their product: 4 m.
    With bfloat16 weights a norm keeps its input in float32. Under autocast (bf16-mixed, DDP) the residual stream is
    float32, and each product keeps a bfloat16 copy of its input.
    With tensor parallel all is split except the gathered inputs of attention and MLP, 2 h (Korthikanti et al. 2022).

    The last norm and the head keep 3 h, of which the gathered input of the head is not split.

    The loss has logits, their log-softmax and its gradient; at its peak three of them exist, in float32. Forward:
    logits, the copy without the last position, log-softmax; backward: log-softmax, its gradient, and that of the
    logits. With tensor parallel they are split over the vocabulary, and torch's loss_parallel has a fourth.
    """
    h, k, m, t = shape.hidden_size, shape.key_value_size, shape.intermediate_size, layout.tensor
    statistics = 4 * shape.num_heads
    head_split, head_gathered = (8 * h, 4 * h) if layout.compute_bytes == 4 else (6 * h, 2 * h)
    if layout.compute_bytes == 4:
        split, gathered = 4 * (4 * h + 2 * h + 2 * k + 4 * m), 4 * 2 * h
    elif _autocast(layout):
        split, gathered = 16 * h + 4 * h + 4 * k + 8 * m, 10 * h  # gathered: five copies of 2 bytes
    else:
        split, gathered = 12 * h + 4 * h + 4 * k + 8 * m, 4 * h
    return (
        (split + statistics) // t + gathered,
        h * (4 if _autocast(layout) else layout.compute_bytes) // t,
        head_split // t + head_gathered,
        shape.vocab_size * 4 * (3 if t == 1 else 4) // t,
    )


def _autocast(layout: ParallelPlan) -> bool:
    """Return whether torch.autocast casts. Under FSDP2 and DeepSpeed the weights are bfloat16 already."""
    return layout.precision.endswith("mixed") and layout.kind in ("single", "ddp")


def _replicated(shape: LlamaShape, weights: Weights, layout: ParallelPlan) -> _Parts:
    """One GPU, and DDP, whose reducer also has buckets of the gradients' size."""
    w = layout.weight_bytes
    gradients = w * weights.all
    held = {"weights": w * weights.all, "AM-AdamW moments": 2 * w * weights.all}
    if layout.kind == "ddp":
        held["gradient buckets"] = gradients
    products = weights.all - (0 if shape.tie_word_embeddings else weights.head)
    casts = {"bfloat16 weights": 2 * products} if _autocast(layout) else {}
    return held, {
        "loss": {**casts, "gradients": gradients},
        "backward": {**casts, "gradients": gradients if layout.accumulate > 1 else w * weights.head},
        "optimizer": {"gradients": gradients},
    }


def _sharded(shape: LlamaShape, weights: Weights, layout: ParallelPlan) -> _Parts:
    """FSDP2: shards of everything. Layers are gathered when they are needed, all other weights for the whole step.

    A gathered layer exists together with the next one's buffer, and a layer's gradients together with the buffer they
    are reduced from.
    """
    w, c = layout.weight_bytes, layout.compute_bytes
    r = 4  # gradients are reduced in float32
    layer = (weights.all - weights.outside) // shape.num_layers
    shard = -(-w * weights.all // layout.data)
    outside = c * weights.outside
    gathered = {"gathered weights": outside + 2 * c * layer}
    backward = (shard if layout.accumulate > 1 else 0) + c * weights.head + (c + r) * layer
    return {"weights": shard, "AM-AdamW moments": 2 * shard}, {
        "loss": {**gathered, "gradients": shard},
        "backward": {**gathered, "gradients": backward},
        "last reduce": {"gathered weights": outside + c * layer, "gradients": shard + (c + r) * weights.outside},
        "optimizer": {"gradients": shard},
    }


def _zero(shape: LlamaShape, weights: Weights, layout: ParallelPlan) -> _Parts:
    """DeepSpeed: (2 + 2 + 12) bytes per parameter in bfloat16, (4 + 4 + 12) in float32. Stage 1 splits the last of them
    (master weights and moments), stage 2 also the gradients, stage 3 all (Rajbhandari et al. 2020, section 3).

    The bucket that gradients are reduced from has its full size for a small model, too. Stage 3 keeps it and the
    gradients' buffer all the time.
    """
    c, n, p, stage = layout.compute_bytes, layout.data, weights.all, layout.stage
    gradients = c * p // (n if stage >= 2 else 1)
    held = {
        "weights": c * p // (n if stage == 3 else 1),
        "float32 weights": 4 * p // (n if stage else 1),
        "AM-AdamW moments": 8 * p // (n if stage else 1),
        **({"reduce bucket": c * ZERO_BUCKET} if stage == 3 else {}),
    }
    earlier = gradients if layout.accumulate > 1 or stage == 3 else 0
    layer = (p - weights.outside) // shape.num_layers
    loss, backward = (c * layer, c * (weights.outside + 2 * layer)) if stage == 3 else (0, 0)
    return held, {
        "loss": {"gathered weights": loss, "gradients": earlier},
        "backward": {
            "gathered weights": backward,
            "gradients": earlier + c * weights.head,
            "reduce buckets": 2 * c * ZERO_BUCKET if stage in (1, 2) else 0,  # overlap_comm has two buckets
        },
        "optimizer": {"gradients": gradients},
    }
