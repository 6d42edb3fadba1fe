"""Optimizers of many kinds with torch.optim's beside each, and values of any type to put in place of theirs."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import Parameter

from am_lightning import AMSGD, AMAdamW


class Run(NamedTuple):
    optimizer: Any
    params: list[Parameter]


def parameters(rng: random.Random) -> list[Parameter]:
    torch.manual_seed(rng.randrange(10**6))
    dtype = rng.choice([torch.float32] * 3 + [torch.float64, torch.bfloat16])
    shapes = [rng.choice([(3,), (2, 3), (3, 2), (), (4,)]) for _ in range(rng.randint(2, 4))]
    return [Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]


def groups_of(rng: random.Random, params: list[Parameter]) -> list[dict[str, Any]]:
    named = rng.random() < 0.5
    given: list[Any] = [(f"layer{i}.weight", p) for i, p in enumerate(params)] if named else list(params)
    cut = rng.randint(1, len(given))
    groups = [{"params": given[:cut], "weight_decay": 0.1}, {"params": given[cut:]}]
    return [group for group in groups if group["params"]]


def optimizer_of(rng: random.Random, params: list[Parameter]) -> tuple[Any, Any]:
    """Return our optimizer and torch.optim's with the same options."""
    lr = rng.choice([0.01, 0.01, torch.tensor(0.01)])
    foreach = rng.choice([False, None, True]) if isinstance(lr, float) else False
    groups, theirs = groups_of(rng, params), [Parameter(p.detach().clone()) for p in params]
    twin = {id(p): other for p, other in zip(params, theirs, strict=True)}
    their_groups = [
        {**g, "params": [(p[0], twin[id(p[1])]) if isinstance(p, tuple) else twin[id(p)] for p in g["params"]]}
        for g in groups
    ]
    common = {"lr": lr, "foreach": foreach, "maximize": rng.random() < 0.2}
    scope = rng.choice(["tensor", "group", "global"])
    if rng.random() < 0.6:
        fused = rng.choice([False, None]) if foreach is None else False
        dtype = rng.choice([None, None, torch.bfloat16])
        ours: Any = AMAdamW(groups, scope=scope, fused=fused, exp_avg_dtype=dtype, **common)
        return Run(ours, params), Run(torch.optim.AdamW(their_groups, **common), theirs)
    gap = "exact" if scope == "global" and isinstance(lr, float) and len(groups) == 1 else "first_order"
    sgd = torch.optim.SGD(their_groups, momentum=0.9, **common)
    return Run(AMSGD(groups, scope=scope, loss_gap=gap, **common), params), Run(sgd, theirs)


def step(run: Run, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in run.params:
        p.grad = (torch.randn(p.shape, generator=generator) + 0.1).to(p)
    run.optimizer.step(lambda: torch.tensor(1.0 / (1 + seed)))


def finite(run: Run) -> bool:
    return all(bool(torch.isfinite(p).all()) for p in run.params)


# ---------------------------------------------------------------------- replacements
def anything(rng: random.Random, old: Any = None) -> Any:
    """Return a value of any type; in place of a tensor often one that resembles it."""
    if isinstance(old, torch.Tensor) and rng.random() < 0.6:
        return rng.choice(_RESEMBLING)(old)
    return rng.choice(_VALUES)()


_VALUES: list[Callable[[], Any]] = [
    *(lambda v=v: v for v in (math.nan, math.inf, -math.inf, -1, -1.0, 0, 0.0, 1, 1.0, 2.5, 0.5, 1e30, 1e300, 10**400)),
    *(lambda v=v: v for v in ("x", "0.1", "", b"1", None, True, False, (), (0.5,), (0.9, 0.99), 1j, object, len)),
    *(lambda v=v: v() for v in (list, dict, set, object)),
    *(lambda v=v: torch.tensor(v) for v in (math.nan, math.inf, -1.0, 0.0, 0.5, 3, True, [1.0, 2.0], [0.5], [], 1j)),
    lambda: torch.empty(3, device="meta"),
    lambda: torch.empty((), device="meta"),
    lambda: torch.ones(3).to_sparse(),
    lambda: np.float32(0.5),
    lambda: np.float64(math.nan),
    lambda: np.ones(3),
    lambda: np.array(2.0),
    lambda: [0.1, "x"],
    lambda: {"exp_avg": 1},
]

_RESEMBLING: list[Callable[[torch.Tensor], Any]] = [
    lambda t: torch.full_like(t, math.nan) if t.is_floating_point() else t,
    lambda t: torch.full_like(t, math.inf) if t.is_floating_point() else t,
    lambda t: -t.abs() - 1,
    lambda t: torch.full_like(t, 1e30) if t.is_floating_point() else t,
    torch.zeros_like,
    lambda t: t.to(torch.float16),
    lambda t: t.to(torch.int64),
    lambda t: t > 0,
    lambda t: t.to(torch.complex64),
    lambda t: t.to("meta"),
    lambda t: t.to_sparse() if t.dim() else t,
    lambda t: t.unsqueeze(0),
    lambda t: t.flatten(),
    lambda t: t.mT.contiguous() if t.dim() == 2 else t.reshape(1, -1),
    lambda t: torch.cat([t.flatten(), t.flatten()]),
    lambda t: t.flatten()[:0],
    lambda t: t.tolist() if not t.is_meta else t,
    lambda t: t.numpy() if t.dtype != torch.bfloat16 else t,
    lambda t: t.clone().requires_grad_() if t.is_floating_point() else t,
    lambda t: float(t.sum()),
]


def pick(rng: random.Random, items: Any) -> Any:
    return rng.choice(list(items))


# ---------------------------------------------------------------------- comparisons
def same(one: Any, other: Any) -> bool:
    """Compare bitwise; nan equals nan."""
    if isinstance(one, torch.Tensor):
        alike = isinstance(other, torch.Tensor) and one.dtype == other.dtype and one.shape == other.shape
        return alike and bool(torch.equal(torch.nan_to_num(one.double(), 7.25), torch.nan_to_num(other.double(), 7.25)))
    if isinstance(one, dict):
        return isinstance(other, dict) and list(one) == list(other) and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return bool(one is other or one == other)


def unchanged(run: Run, twin: Run) -> bool:
    """Return whether the two are equal and their next steps are, too."""
    if not same(run.optimizer.state_dict(), twin.optimizer.state_dict()) or not same(run.params, twin.params):
        return False
    for each in (run, twin):
        step(each, 77)
    return same(run.optimizer.state_dict(), twin.optimizer.state_dict()) and same(run.params, twin.params)


def tried(call: Callable[[], Any]) -> Exception | None:
    try:
        call()
    except Exception as error:
        return error
    return None


def three_steps(run: Run) -> None:
    for seed in (5, 6, 7):
        step(run, seed)
