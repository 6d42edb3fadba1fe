"""Runs with one huge finite gradient for every kernel, also in the process in which Triton is interpreted."""

from __future__ import annotations

from typing import Any

import torch

from am_lightning import clip_grad_norm_
from tests.optim.harness import assert_bitwise, build, named_params, params_of, snapshot

SHAPES = [(6, 4), (9,), (70_001,), (3,)]
BETA2 = 0.99
# For each dtype, a gradient that v' = v + (1 - beta2) (g^2 - v) can represent and one that it cannot.
FITS = {
    torch.float32: 2.0**64 - 2.0**40,
    torch.float64: 2.0**511,
    torch.bfloat16: 2.0**64 - 2.0**56,
    torch.float16: 2500.0,
}
TOO_LARGE = {torch.float32: 2.0**64, torch.float64: 2.0**512, torch.bfloat16: 2.0**64, torch.float16: 2600.0}


def give_grads(optimizer: torch.optim.Optimizer, step: int, value: float | None = None, at: int = 0) -> None:
    generator = torch.Generator().manual_seed(step)
    for i, p in enumerate(params_of(optimizer)):
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        if value is not None and i == at:
            p.grad.view(-1)[-1] = value


def is_finite(optimizer: torch.optim.Optimizer) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in snapshot(optimizer))


def make(kind: str, dtype: torch.dtype, **options: Any) -> Any:
    own = {"betas": (0.89, BETA2)} if kind == "adamw" else {}
    return build(kind, named_params(SHAPES, dtype), lr=1e-2, **own, **options)


def dropped(
    kind: str, dtype: str, value: float, tier: str, at: int = 0, clip: float | None = None, **options: Any
) -> None:
    """The step leaves no trace, even as the first one; it is counted, and the run ends bitwise as one without it."""
    ends = []
    for bad in ((), (0, 3, 4)):
        optimizer = make(kind, getattr(torch, dtype), **options)
        for step in range(6):
            if step in bad:
                before = snapshot(optimizer)
                give_grads(optimizer, 50, value, at)
                if clip is not None:
                    clip_grad_norm_(optimizer, clip, in_step=True)
                optimizer.step()
                assert bool(optimizer.last_step_skipped), f"step {step}"
                if step:  # the first step creates the states
                    assert_bitwise(snapshot(optimizer), before)
                optimizer.zero_grad()
            give_grads(optimizer, step)
            optimizer.step()
            assert not bool(optimizer.last_step_skipped), f"step {step}"
        assert optimizer.report()[-4] == len(bad)
        assert tier in optimizer.describe(), optimizer.describe()
        assert is_finite(optimizer)
        ends.append(snapshot(optimizer))
    assert_bitwise(*ends)


def taken(kind: str, dtype: str, value: float, clip: float | None = None, **options: Any) -> None:
    """The step counts, what it writes is finite, and so are later steps, in which the other elements still move."""
    optimizer = make(kind, getattr(torch, dtype), **options)
    for step in range(6):
        before = params_of(optimizer)[1].detach().clone()
        give_grads(optimizer, step, value if step == 2 else None)
        if clip is not None:
            clip_grad_norm_(optimizer, clip, in_step=True)
        optimizer.step()
        assert not bool(optimizer.last_step_skipped), f"step {step}"
        assert is_finite(optimizer), f"step {step}"
        assert not torch.equal(params_of(optimizer)[1].detach(), before)
