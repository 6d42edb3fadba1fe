"""Optimizers that are compared."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from am_lightning.optim import AMAdamW
from am_lightning.optional_imports import cause_of
from am_lightning.pretrain.runtime.errors import RecipeError

BETA2, EPS = 0.95, 1e-8
KINDS = ("adamw", "radam", "schedulefree", "am")


@dataclass(frozen=True)
class Method:
    """An optimizer with all its settings except the learning rate.

    Attributes:
        kind: one of KINDS.
        beta1: fixed momentum, or the cap of AM.
        warmup: share of the steps over which the learning rate rises.
        scope, lambd: options of AM.
        am_until: share of the steps after which AM's momentum is fixed at its cap and lambda is 0 (AdamW). 1: never.
    """

    kind: str
    beta1: float = 0.9
    warmup: float = 0.0
    scope: str = "tensor"
    lambd: float = 0.1
    am_until: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise RecipeError(f"kind is {self.kind!r}; allowed: {', '.join(KINDS)}")

    def __str__(self) -> str:
        warmup = f", warmup {self.warmup:.0%}" if self.warmup else ", no warmup"
        if self.kind != "am":
            name = {"adamw": "AdamW", "radam": "RAdam", "schedulefree": "schedule-free AdamW"}[self.kind]
            return f"{name} {self.beta1:g}{warmup}"
        extra = f" {self.scope}" if self.scope != "tensor" else ""
        extra += f", lambda {self.lambd:g}" if self.lambd != 0.1 else ""
        extra += f", first {self.am_until:.0%} only" if self.am_until < 1 else ""
        return f"AM-AdamW {self.beta1:g}{extra}{warmup if self.warmup else ''}"


def make_optimizer(method: Method, groups: Iterable[dict[str, Any]], lr: float, steps: int) -> torch.optim.Optimizer:
    """Return the optimizer of param groups, which have their own weight decay.

    Raises:
        ImportError: if schedule-free is asked for and not installed.
    """
    betas = (method.beta1, BETA2)
    if method.kind == "schedulefree":
        try:
            from schedulefree import AdamWScheduleFree
        except ImportError as error:
            raise ImportError(
                "schedule-free needs its package: pip install 'am-lightning[studies]', or '.[studies]' in a checkout"
            ) from cause_of(error, "schedulefree")
        unnamed = [{key: value for key, value in group.items() if key != "param_names"} for group in groups]
        optimizer: torch.optim.Optimizer = AdamWScheduleFree(
            unnamed, lr, betas, EPS, warmup_steps=round(steps * method.warmup)
        )
        return optimizer
    if method.kind == "am":
        return AMAdamW(groups, lr, betas, EPS, lambd=method.lambd, scope=method.scope)
    if method.kind == "radam":
        return torch.optim.RAdam(groups, lr, betas, EPS, decoupled_weight_decay=True, foreach=True)
    return torch.optim.AdamW(groups, lr, betas, EPS, foreach=True)


def fix_momentum(optimizer: AMAdamW) -> torch.optim.AdamW:
    """Return AdamW that continues from AM's state, with AM's cap as beta1. Schedulers must be rebuilt."""
    groups = [{key: group[key] for key in ("params", "lr", "weight_decay")} for group in optimizer.param_groups]
    fixed = torch.optim.AdamW(groups, eps=EPS, foreach=True)
    fixed.load_state_dict(optimizer.state_dict())
    return fixed
