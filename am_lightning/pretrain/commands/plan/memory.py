"""Memory of one GPU during a step, by component, at the moments when it can be largest.

Counted from what transformers' Llama and torch keep, in bytes; `tests/recipes/test_plan_reality.py` measures it. Not
counted: the CUDA context, NCCL's buffers and fragmentation, for which `RESERVE` stands.
"""

from __future__ import annotations

import dataclasses

from am_lightning.pretrain.commands.plan.layout import ParallelPlan
from am_lightning.pretrain.model.shape import LlamaShape, count_parameters

GIB = 1 << 30
RESERVE = 2 * GIB  # context, NCCL and fragmentation: a guess, stated where it is used
_BUCKET = 4 << 20  # elements that the optimizer's foreach passes take at a time, with up to 8 float32 temporaries
_ZERO_BUCKET = 200_000_000  # elements; Lightning's reduce_bucket_size


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one GPU.

    Attributes:
        held: what is there all the time: weights, moments, buffers.
        moments: moment of a step -> component -> bytes, beside what is held.
    """

    held: dict[str, int]
    moments: dict[str, dict[str, int]]

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
    """Memory of a step of training.

    Args:
        checkpointing: activation checkpointing is on.
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
        layer = layer_activations(shape, layout)
        kept = layer_input(shape, layout) if checkpointing else layer
        self.activations = shape.num_layers * kept + head_activations(shape, layout)
        self.recomputed = layer if checkpointing else 0
        self.loss = loss_buffers(shape, layout)

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


def layer_activations(shape: LlamaShape, layout: ParallelPlan) -> int:
    """Bytes that a decoder layer keeps for its backward pass, on one GPU.

    For a token, in elements (width h, keys k, MLP m), from transformers' LlamaDecoderLayer and fused attention:
    2 norms: input, normalized input, output: 6 h; attention: queries, output 2 h, keys and values 2 k, a float32 for
    each head; MLP: gate, its SiLU, up, their product: 4 m.
    With bfloat16 weights a norm keeps its input in float32. Under autocast (bf16-mixed, DDP) the residual stream is
    float32, and each product keeps a bfloat16 copy of its input.
    With tensor parallel all is split but the gathered inputs of attention and MLP, 2 h (Korthikanti et al. 2022).
    """
    h, k, m = shape.hidden_size, shape.key_value_size, shape.intermediate_size
    statistics = 4 * shape.num_heads
    if layout.compute_bytes == 4:
        split, gathered = 4 * (4 * h + 2 * h + 2 * k + 4 * m), 4 * 2 * h
    elif _autocast(layout):
        split, gathered = 16 * h + 4 * h + 4 * k + 8 * m, 10 * h  # gathered: five copies of 2 bytes
    else:
        split, gathered = 12 * h + 4 * h + 4 * k + 8 * m, 4 * h
    return _tokens(shape, layout) * ((split + statistics) // layout.tensor + gathered)


def layer_input(shape: LlamaShape, layout: ParallelPlan) -> int:
    """Bytes of a layer's input, which is all that activation checkpointing keeps of it."""
    width = 4 if _autocast(layout) else layout.compute_bytes
    return _tokens(shape, layout) * shape.hidden_size * width // layout.tensor


def head_activations(shape: LlamaShape, layout: ParallelPlan) -> int:
    """Bytes that the last norm and the head keep: 3 h, of which the gathered input of the head is not split."""
    h = shape.hidden_size
    split, gathered = (8 * h, 4 * h) if layout.compute_bytes == 4 else (6 * h, 2 * h)
    return _tokens(shape, layout) * (split // layout.tensor + gathered)


def loss_buffers(shape: LlamaShape, layout: ParallelPlan) -> int:
    """Bytes of logits, their log-softmax and its gradient, where they are largest: three times float32.

    They are never all there: forward: logits, the copy without the last position, log-softmax; backward: log-softmax,
    the gradient of it, and of the logits. With tensor parallel they are split over the vocabulary, and torch's
    loss_parallel has a fourth.
    """
    times = 3 if layout.tensor == 1 else 4
    return _tokens(shape, layout) * shape.vocab_size * 4 * times // layout.tensor


def _tokens(shape: LlamaShape, layout: ParallelPlan) -> int:
    return layout.rows * shape.seq_len


def _autocast(layout: ParallelPlan) -> bool:
    """torch.autocast casts: FSDP2 and DeepSpeed give bfloat16 weights, so that there is nothing to cast."""
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
    moments["backward"]["reduce buckets"] = 2 * c * bucket if stage in (1, 2) else 0  # two: overlap_comm
    moments["optimizer"]["optimizer scratch"] += 4 * p // n
    return Memory(held, moments)
