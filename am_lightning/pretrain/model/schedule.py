"""The learning rate over a run: cosine, warmup-stable-decay or constant, each with or without a warmup."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from am_lightning.pretrain.runtime.errors import require

KINDS = ("cosine", "wsd", "constant")


@dataclass(frozen=True)
class Schedule:
    """The learning rate of every optimizer step as a share of the peak.

    It rises linearly over the first `warmup_fraction` of the steps. After that, "cosine" falls along half a cosine to
    `final_fraction` (Loshchilov & Hutter 2017). "wsd" stays at the peak, and falls linearly to `final_fraction` over
    the last `decay_fraction` of the steps, but not during the warmup (warmup-stable-decay, Hu et al. 2024). "constant"
    stays at the peak.

    Raises:
        RecipeError: if a value is out of range. The text has the names that the settings have in a recipe.
    """

    kind: str = "cosine"
    warmup_fraction: float = 0.0
    decay_fraction: float = 0.2
    final_fraction: float = 0.1

    def __post_init__(self) -> None:
        require(self.kind in KINDS, "model.schedule", self.kind, " or ".join(KINDS))
        for name in ("warmup_fraction", "decay_fraction", "final_fraction"):
            setting = f"model.{name.replace('final', 'final_lr')}"
            require(0 <= getattr(self, name) <= 1, setting, getattr(self, name), "0 <= value <= 1")

    def factor(self, step: int, total: int) -> float:
        """Return the share of the peak at optimizer step `step`, counted from 0, of a run of `total` steps."""
        warmup = round(total * self.warmup_fraction)
        if step < warmup:
            return (step + 1) / warmup
        if self.kind == "constant":
            return 1.0
        start = max(warmup, total - round(total * self.decay_fraction)) if self.kind == "wsd" else warmup
        progress = min(1.0, max(0, step - start) / max(1, total - start))
        shape = 0.5 * (1 + math.cos(math.pi * progress)) if self.kind == "cosine" else 1 - progress
        return self.final_fraction + (1 - self.final_fraction) * shape

    def scheduler(self, optimizer: Optimizer, total: int) -> LambdaLR:
        """Return a scheduler for a run of `total` optimizer steps. Call its ``step()`` after each of them.

        Raises:
            RecipeError: if `total` is not positive.
        """
        require(total >= 1, "trainer.max_steps", total, "a whole number >= 1: the schedule needs its length")
        return _LiveLambdaLR(optimizer, partial(self.factor, total=total))


class _LiveLambdaLR(LambdaLR):
    """LambdaLR that resumes at the step of a checkpoint, with its own peaks and length."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the step, and set the learning rates, because the optimizer's state has those of the checkpoint."""
        step = state_dict["last_epoch"]
        rates = [base * factor(step) for base, factor in zip(self.base_lrs, self.lr_lambdas, strict=True)]
        super().load_state_dict({**state_dict, "base_lrs": self.base_lrs, "_last_lr": rates})
        for group, rate, base in zip(self.optimizer.param_groups, rates, self.base_lrs, strict=True):
            group |= {"lr": rate, "initial_lr": base}
