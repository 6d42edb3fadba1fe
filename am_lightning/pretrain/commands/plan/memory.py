"""Memory of one GPU during a step, by component, at the moments when it can be largest.

It is counted from what transformers' Llama and torch keep; `tests/recipes/test_plan_reality.py` measures it. The CUDA
context, NCCL's buffers and fragmentation are not counted, but estimated by `RESERVE`.
"""

from __future__ import annotations

import dataclasses

from am_lightning.pretrain.commands.plan.layout import ParallelPlan
from am_lightning.pretrain.model.shape import LlamaShape, count_parameters

RESERVE = 2 << 30  # context, NCCL and fragmentation: a guess, which the plan states
_BUCKET = 4 << 20  # elements in a chunk of the optimizer's foreach passes, which have up to 8 float32 temporaries
_ZERO_BUCKET = 200_000_000  # elements; Lightning's reduce_bucket_size


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


def memory_of(
    shape: LlamaShape,
    layout: ParallelPlan,
    *,
    checkpointing: bool,
    scratch: int | None = None,
    zero_bucket: int = _ZERO_BUCKET,
) -> Memory:
    """Return the memory of a step of training.

    Args:
        checkpointing: True if activation checkpointing is on.
        scratch: bytes that the optimizer uses while it steps; None: what foreach uses on a GPU without Triton.
        zero_bucket: DeepSpeed's reduce_bucket_size, in elements.
    """
    counts = _Counts(shape, layout, checkpointing=checkpointing, scratch=scratch)
    if layout.kind == "fsdp":
        return _sharded(counts, layout)
    if layout.kind == "zero":
        return _zero(counts, layout, zero_bucket)
    return _replicated(counts, layout)


class _Counts:
    """Elements of the weights on one GPU of a tensor parallel group, and bytes that every strategy takes alike."""

    def __init__(self, shape: LlamaShape, layout: ParallelPlan, *, checkpointing: bool, scratch: int | None) -> None:
        h, t = shape.hidden_size, layout.tensor
        vocabulary = shape.vocab_size * h
        norms = (2 * shape.num_layers + 1) * h  # every GPU of a group has them
        self.all = (count_parameters(shape) - norms) // t + norms
        self.head = vocabulary // t
        self.outside = (1 if shape.tie_word_embeddings else 2) * vocabulary // t + h  # embedding, head, last norm
        self.layer = (self.all - self.outside) // shape.num_layers
        self.products = self.all - (0 if shape.tie_word_embeddings else vocabulary // t)
        whole = layout.kind in ("single", "ddp") or (layout.kind == "zero" and not layout.stage)
        temporaries = 8 * 4 * min(_BUCKET, self.all if whole else self.all // layout.data)
        self.scratch = temporaries if scratch is None else scratch
        tokens = layout.rows * shape.seq_len
        layer, layer_input, head, loss = (tokens * size for size in _token_bytes(shape, layout))
        self.activations = shape.num_layers * (layer_input if checkpointing else layer) + head
        self.recomputed = layer if checkpointing else 0
        self.loss = loss

    def moments(
        self, copies: tuple[dict[str, int], dict[str, int]], gradients: tuple[int, int, int]
    ) -> dict[str, dict[str, int]]:
        """Return moment -> component -> bytes.

        Args:
            copies: temporary copies of weights at the loss and in the backward pass.
            gradients: bytes of the gradients at the loss, in the backward pass and in the optimizer.
        """
        loss, backward, optimizer = gradients
        return {
            "loss": {**copies[0], "activations": self.activations, "loss": self.loss, "gradients": loss},
            "backward": {**copies[1], "activations": self.activations + self.recomputed, "gradients": backward},
            "optimizer": {"gradients": optimizer, "optimizer scratch": self.scratch},
        }


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


def _replicated(counts: _Counts, layout: ParallelPlan) -> Memory:
    """One GPU, and DDP, whose reducer also has buckets of the gradients' size."""
    w = layout.weight_bytes
    held = {"weights": w * counts.all, "AM-AdamW moments": 2 * w * counts.all}
    if layout.kind == "ddp":
        held["gradient buckets"] = w * counts.all
    gradients = w * counts.all
    casts = {"bfloat16 weights": 2 * counts.products} if _autocast(layout) else {}
    backward = gradients if layout.accumulate > 1 else w * counts.head
    return Memory(held, counts.moments((casts, casts), (gradients, backward, gradients)))


def _sharded(counts: _Counts, layout: ParallelPlan) -> Memory:
    """FSDP2: shards of everything. Layers are gathered when they are needed, all other weights for the whole step.

    A gathered layer exists together with the next one's buffer, and a layer's gradients together with the buffer they
    are reduced from.
    """
    w, c, n = layout.weight_bytes, layout.compute_bytes, layout.data
    r = 4  # gradients are reduced in float32
    layers = 2 * c * counts.layer
    shard = -(-w * counts.all // n)
    outside = c * counts.outside
    gathered = {"gathered weights": outside + layers}
    backward = (shard if layout.accumulate > 1 else 0) + c * counts.head + (c + r) * counts.layer
    moments = counts.moments((gathered, gathered), (shard, backward, shard))
    optimizer = moments.pop("optimizer")
    last = {"gathered weights": outside + layers // 2, "gradients": shard + (c + r) * counts.outside}
    return Memory(
        {"weights": shard, "AM-AdamW moments": 2 * shard}, {**moments, "last reduce": last, "optimizer": optimizer}
    )


def _zero(counts: _Counts, layout: ParallelPlan, bucket: int) -> Memory:
    """DeepSpeed: (2 + 2 + 12) bytes per parameter in bfloat16, (4 + 4 + 12) in float32. Stage 1 splits the last of them
    (master weights and moments), stage 2 also the gradients, stage 3 all (Rajbhandari et al. 2020, section 3).

    The bucket that gradients are reduced from has its full size for a small model, too. Stage 3 keeps it and the
    gradients' buffer all the time.
    """
    c, n, p, stage = layout.compute_bytes, layout.data, counts.all, layout.stage
    gradients = c * p // (n if stage >= 2 else 1)
    held = {
        "weights": c * p // (n if stage == 3 else 1),
        "float32 weights": 4 * p // (n if stage else 1),
        "AM-AdamW moments": 8 * p // (n if stage else 1),
        **({"reduce bucket": c * bucket} if stage == 3 else {}),
    }
    earlier = gradients if layout.accumulate > 1 or stage == 3 else 0
    layer, around = (c * counts.layer, c * (counts.outside + 2 * counts.layer)) if stage == 3 else (0, 0)
    copies = {"gathered weights": layer}, {"gathered weights": around}
    moments = counts.moments(copies, (earlier, earlier + c * counts.head, gradients))
    moments["backward"]["reduce buckets"] = 2 * c * bucket if stage in (1, 2) else 0  # overlap_comm has two buckets
    moments["optimizer"]["optimizer scratch"] += 4 * p // n
    return Memory(held, moments)
