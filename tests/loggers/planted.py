"""A model with a known beta_t at every step: its gradients are solved from a table of beta_t.

Every tensor is uniform and its gradient is g = r d, so that N / D = (1 - 2 r) q / (1 - r)^2 with q = 1 + lambda P. This
is solved for r. Weight decay is 0 and the learning rate constant.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from am_lightning import AMAdamW

CAP = 0.89
DIP = "layers.1.mlp.weight", 24, 0.01  # a single step, at which no log interval of 7 or 50 steps ends
NAMES = ["embed.weight", *(f"layers.{i}.{kind}.weight" for i in range(2) for kind in ("mlp", "norm")), "head.weight"]
PARTS = NAMES[:-1], NAMES[-1:]  # the tensors of each of two optimizers
GROUPS = {kind: [name for name in NAMES if f"{kind}." in name] for kind in ("embed", "mlp", "norm", "head")}
LAYERS = {layer: [name for name in NAMES if layer in name] for layer in ("embed", "layers.0", "layers.1", "head")}
_COURSE = (CAP, 0.7, 0.3, 0.85, CAP, 0.55, 0.42, CAP, 0.8, 0.62, 0.75)

Table = Callable[[str, int], float]


def table(name: str, step: int) -> float:
    """Return beta_t of tensor ``name`` in step 1, 2, ...: between the clamps, at the cap, and for one tensor also 0."""
    tensor = NAMES.index(name)
    if step == 1:
        return CAP  # in every step
    if (name, step) == DIP[:2]:
        return DIP[2]
    if name == "layers.0.norm.weight" and step % 5 == 3:
        return 0.0
    return _COURSE[(step * (tensor + 2) + tensor) % len(_COURSE)]


def planted(steps: int, names: Sequence[str] = NAMES, of: Table = table) -> list[dict[str, float]]:
    """Return beta_t of each step, which ``tests.loggers.intervals`` calls ``seen``."""
    return [{name: of(name, step) for name in names} for step in range(1, steps + 1)]


class Planted(nn.Module):
    """Six small tensors in float64; the gradients of ``loss`` follow the table."""

    def __init__(self, of: Table = table) -> None:
        super().__init__()
        self.of = of
        self.embed = nn.Embedding(3, 2)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"mlp": nn.Linear(3, 2, bias=False), "norm": nn.LayerNorm(3, bias=False)}) for _ in range(2)
        )
        self.head = nn.Linear(2, 1, bias=False)
        for param in self.parameters():
            nn.init.ones_(param)
        self.double()

    def loss(self, *optimizers: Any) -> Tensor:
        """Return the loss for the next step of the tensors of all ``optimizers``; pass those inside a wrapper."""
        names = {id(param): name for name, param in self.named_parameters()}
        terms = [
            param.sum() * gradient_for(partial(self.of, names[id(param)]), param, group, optimizer)
            for optimizer in optimizers
            for group in optimizer.param_groups
            for param in group["params"]
        ]
        return torch.stack(terms).sum()


def gradient_for(wanted: Callable[[int], float], param: Tensor, group: Mapping[str, Any], optimizer: Any) -> float:
    """Return the gradient of every element of ``param`` that makes beta_t of its next step equal to ``wanted``."""
    state = optimizer.state.get(param, {})
    step = int(state.get("step", 0)) + 1
    beta = wanted(step)
    if step == 1:
        return 1.0
    d, v, product = (float(state[key].flatten()[0]) for key in ("exp_avg", "exp_avg_sq", "beta_prod"))
    cap, beta2 = group["betas"]
    if beta == cap:  # above the clamp
        return math.copysign(2.0, d)
    if beta == 0:
        return 0.02 * d
    share, r, sign = 1 - beta, 0.5, 1 if step % 2 else -1
    for _ in range(60):  # q depends on the gradient, but weakly
        root = math.sqrt((beta2 * v + (1 - beta2) * (r * d) ** 2) / (1 - beta2**step))
        q = 1 + group["lambd"] * (1 - cap * product) * (root + group["eps"])
        r = (share - q + sign * math.sqrt(q * (q - share))) / share
    return r * d


def split_in_two(net: Planted) -> list[AMAdamW]:
    """Give the head to a second optimizer."""
    named = dict(net.named_parameters())
    return [AMAdamW([(name, named[name]) for name in part], lr=0.01, weight_decay=0.0) for part in PARTS]


def curves_of_two(steps: int, every: Sequence[int]) -> dict[str, dict[int, float]]:
    """Return the curves of two optimizers, each at its own log interval."""
    from tests.loggers.intervals import curves_of

    found = {}
    for prefix, part, interval in zip(("am", "am-1"), PARTS, every, strict=True):
        curves = curves_of(planted(steps, part), range(interval, steps + 1, interval), cap=CAP)
        found |= {tag.replace("am/", f"{prefix}/"): points for tag, points in curves.items()}
    return found


def by_label(
    seen: Sequence[Mapping[str, float]], ends: Iterable[int], labels: Mapping[str, Sequence[str]], tag: str
) -> dict[str, dict[int, float]]:
    """Return curves of the mean and the lowest of each label, as ``intervals.curves_of`` does.

    Args:
        labels: label -> its tensors.
        tag: prefix of the label: ``am/beta/`` or ``am/beta/layer/``.
    """
    curves: dict[str, dict[int, float]] = {}
    after = 0
    for until in ends:
        for label, names in labels.items():
            betas = [step[name] for step in seen[after:until] for name in names]
            curves.setdefault(f"{tag}{label}", {})[until] = sum(betas) / len(betas)
            curves.setdefault(f"{tag}{label}/min", {})[until] = min(betas)
        after = until
    return curves


def expected_curves(steps: int, every: int, *, layers: bool = True) -> dict[str, dict[int, float]]:
    """Return all planted curves of a run that logs after each ``every`` steps."""
    from tests.loggers.intervals import curves_of

    seen, ends = planted(steps), range(every, steps + 1, every)
    curves = curves_of(seen, ends, cap=CAP) | by_label(seen, ends, GROUPS, "am/beta/")
    return curves | (by_label(seen, ends, LAYERS, "am/beta/layer/") if layers else {})
