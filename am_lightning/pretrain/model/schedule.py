"""The learning rate over a run: cosine, warmup-stable-decay or constant; without a warmup unless asked for one."""

from __future__ import annotations

import math
from functools import partial

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from am_lightning.pretrain.runtime.errors import require

KINDS = ("cosine", "wsd", "constant")


def learning_rate_factor(
    step: int,
    total: int,
    kind: str = "cosine",
    warmup_fraction: float = 0.0,
    decay_fraction: float = 0.2,
    final_fraction: float = 0.1,
) -> float:
    """The learning rate of optimizer step `step` (from 0) as a share of the peak.

    Linear over the first `warmup_fraction` of `total` steps; then, by `kind`:
    "cosine": half a cosine down to `final_fraction` (Loshchilov & Hutter 2017);
    "wsd": the peak, and over the last `decay_fraction` of `total` steps linear down to `final_fraction`
    (warmup-stable-decay, Hu et al. 2024), though never before the warmup is over;
    "constant": the peak.
    """
    warmup = round(total * warmup_fraction)
    if step < warmup:
        return (step + 1) / warmup
    if kind == "constant":
        return 1.0
    start = max(warmup, total - round(total * decay_fraction)) if kind == "wsd" else warmup
    progress = min(1.0, max(0, step - start) / max(1, total - start))
    shape = 0.5 * (1 + math.cos(math.pi * progress)) if kind == "cosine" else 1 - progress
    return final_fraction + (1 - final_fraction) * shape


def make_schedule(
    optimizer: Optimizer,
    total: int,
    kind: str = "cosine",
    warmup_fraction: float = 0.0,
    decay_fraction: float = 0.2,
    final_fraction: float = 0.1,
) -> LambdaLR:
    """A scheduler for `total` optimizer steps, to be stepped after each; arguments of `learning_rate_factor`.

    Raises:
        RecipeError: an argument is out of range.
    """
    check_schedule(kind, warmup_fraction, decay_fraction, final_fraction)
    require(total >= 1, "trainer.max_steps", total, "a whole number >= 1: the schedule needs its length")
    factor = partial(
        learning_rate_factor,
        total=total,
        kind=kind,
        warmup_fraction=warmup_fraction,
        decay_fraction=decay_fraction,
        final_fraction=final_fraction,
    )
    return LambdaLR(optimizer, factor)


def check_schedule(kind: str, warmup_fraction: float, decay_fraction: float, final_fraction: float) -> None:
    """Raise a RecipeError, with the names the settings have in a configuration, unless all are in range."""
    require(kind in KINDS, "model.schedule", kind, " or ".join(KINDS))
    shares = {"warmup_fraction": warmup_fraction, "decay_fraction": decay_fraction, "final_lr_fraction": final_fraction}
    for name, value in shares.items():
        require(0 <= value <= 1, f"model.{name}", value, "0 <= value <= 1")
