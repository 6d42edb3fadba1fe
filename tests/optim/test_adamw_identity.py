"""With beta at its cap and lambda = 0 the optimizer is torch.optim.AdamW(betas=(cap, beta2)), to rounding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from am_lightning import AMAdamW
from tests.optim.harness import KERNELS, SCOPES, assert_close, make_oracle, named_params, params_of, to_numpy

CAP, BETA2 = 0.1, 0.99
SHAPES = [(7, 5), (13,), (), (0,), (4, 3, 3)]
SCHEDULES: dict[str, Callable[[int], float]] = {
    "constant": lambda i: 0.05,
    "decay": lambda i: 0.05 * 0.8**i,
    "warmup from zero": lambda i: 0.01 * i,
    "cosine": lambda i: 0.025 * (1.1 + np.cos(np.pi * i / 6)),
}


def steady_grads(seed: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return gradients around a fixed non-zero mean: the memory points along them and raw betas far exceed a cap."""
    gen = torch.Generator().manual_seed(seed)

    def make(p: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(p.shape, generator=gen, dtype=torch.float64)
        return (1.0 + 0.03 * noise).to(p.dtype)

    return make


def pair(scope: str, foreach: bool | None, **options: Any) -> tuple[AMAdamW, torch.optim.AdamW]:
    ours, theirs = named_params(SHAPES, torch.float64), named_params(SHAPES, torch.float64)

    def groups(params: list[Any]) -> list[dict[str, Any]]:
        return [{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.0}]

    betas = {"betas": (CAP, BETA2)}
    mine = AMAdamW(groups(ours), lambd=0.0, scope=scope, foreach=foreach, **betas, **options)
    return mine, torch.optim.AdamW(groups(theirs), foreach=foreach, **betas, **options)


def assert_same(mine: torch.optim.Optimizer, torchs: torch.optim.Optimizer) -> None:
    for p, q in zip(params_of(mine), params_of(torchs), strict=True):
        assert_close(to_numpy(p), to_numpy(q), 1e-12, "weights")
        for key in ("step", "exp_avg", "exp_avg_sq"):
            assert_close(to_numpy(mine.state[p][key]), to_numpy(torchs.state[q][key]), 1e-12, key)


@pytest.mark.parametrize("foreach", KERNELS)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("schedule", list(SCHEDULES))
def test_equal_to_adamw_while_beta_is_at_its_cap(
    schedule: str, maximize: bool, scope: str, foreach: bool | None
) -> None:
    mine, torchs = pair(scope, foreach, weight_decay=0.1, maximize=maximize, lr=0.05)
    oracle = make_oracle(mine, scope=scope)
    grads = steady_grads(1)
    for i in range(12):
        for opt in (mine, torchs):
            for group in opt.param_groups:
                group["lr"] = SCHEDULES[schedule](i)
        for mirror in oracle.groups:
            mirror["lr"] = SCHEDULES[schedule](i)
        for p, q in zip(params_of(mine), params_of(torchs), strict=True):
            p.grad = grads(p)
            q.grad = p.grad.clone()
        oracle.step([to_numpy(p.grad) for p in params_of(mine)])
        mine.step()
        torchs.step()
        for p, slot, beta in zip(params_of(mine), oracle.slots, mine.momentum().values(), strict=True):
            if p.numel():
                assert i == 0 or slot.raw > CAP, "the data must keep the raw beta above the cap"
                assert float(beta) == pytest.approx(CAP, abs=1e-15)
    assert_same(mine, torchs)
    for p in params_of(mine):
        if p.numel():
            expected = CAP ** float(mine.state[p]["step"])
            assert float(mine.state[p]["beta_prod"]) == pytest.approx(expected, rel=1e-12)


def test_the_identity_needs_the_cap() -> None:
    """The comparison above is not vacuous: the two differ where the raw beta falls below the cap."""
    mine, torchs = pair("tensor", None, lr=0.5, weight_decay=0.0)
    for sign, lr in ((1.0, 0.5), (-1.0, 0.1)):
        for opt in (mine, torchs):
            for group in opt.param_groups:
                group["lr"] = lr
            for p in params_of(opt):
                p.grad = torch.full_like(p, sign)
            opt.step()
    assert float(mine.momentum()["w0"]) < CAP
    with pytest.raises(AssertionError):
        assert_same(mine, torchs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float32_and_bfloat16_follow_adamw(dtype: torch.dtype) -> None:
    mine_params, their_params = named_params(SHAPES, dtype), named_params(SHAPES, dtype)
    mine = AMAdamW(mine_params, lr=0.05, betas=(CAP, BETA2), lambd=0.0)
    torchs = torch.optim.AdamW(their_params, lr=0.05, betas=(CAP, BETA2), foreach=False)
    grads = steady_grads(2)
    tol = 1e-5 if dtype == torch.float32 else 0.05
    for _ in range(8):
        for (_, p), (_, q) in zip(mine_params, their_params, strict=True):
            p.grad = grads(p)
            q.grad = p.grad.clone()
        mine.step()
        torchs.step()
    for (_, p), (_, q) in zip(mine_params, their_params, strict=True):
        assert_close(to_numpy(p), to_numpy(q), tol, "weights")
