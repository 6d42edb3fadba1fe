"""clip_grad_norm_ against torch.nn.utils.clip_grad_norm_."""

from __future__ import annotations

import pytest
import torch

from am_lightning import AMSGD, AMAdamW, clip_grad_norm_


def make(dtype: torch.dtype = torch.float64) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in ((3, 4), (5,), (), (0,), (2,))]
    for param in params[:-1]:  # the last parameter has no gradient
        param.grad = torch.randn(param.shape, generator=generator, dtype=torch.float64).to(dtype)
    return params


@pytest.mark.parametrize("optimizer", [AMAdamW, AMSGD])
@pytest.mark.parametrize("max_norm", [0.0, 0.5, 1e3, float("inf")])
def test_norm_and_scaled_gradients_are_torchs(optimizer, max_norm: float) -> None:
    ours, theirs = make(), make()
    norm = clip_grad_norm_(optimizer(ours), max_norm)  # before the first step
    expected = torch.nn.utils.clip_grad_norm_(theirs, max_norm)
    torch.testing.assert_close(norm, expected, rtol=1e-12, atol=0)
    for a, b in zip(ours[:-1], theirs[:-1], strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-12, atol=0)
    assert ours[-1].grad is None


def test_low_precision_norm_is_summed_in_float32() -> None:
    param = torch.nn.Parameter(torch.zeros(100_000, dtype=torch.bfloat16))
    param.grad = torch.full_like(param, 0.01)
    expected = param.grad.double().norm()
    torch.testing.assert_close(clip_grad_norm_(AMAdamW([param]), 1.0), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(param.grad.double().norm(), torch.tensor(1.0).double(), rtol=1e-2, atol=0)


def test_no_gradient_at_all_has_norm_zero() -> None:
    assert clip_grad_norm_(AMAdamW([torch.nn.Parameter(torch.ones(3))]), 1.0) == 0


@pytest.mark.parametrize("max_norm", [-1.0, float("nan"), "1", None, True])
def test_bad_max_norm_is_named(max_norm) -> None:
    with pytest.raises((TypeError, ValueError), match="max_norm"):
        clip_grad_norm_(AMAdamW(make()), max_norm)


def test_another_optimizer_is_refused() -> None:
    with pytest.raises(TypeError, match=r"optimizer must be AMAdamW or AMSGD.*clip_grad_norm_\(optimizer, max_norm\)"):
        clip_grad_norm_(torch.optim.AdamW(make()), 1.0)


KERNELS = [{"foreach": False}, {"foreach": None}, {"foreach": True}, {"fused": True}]


@pytest.mark.parametrize("kernels", KERNELS, ids=str)
@pytest.mark.parametrize("optimizer", [AMAdamW, AMSGD])
def test_clipping_in_the_step_is_clipping_before_it(optimizer, kernels: dict[str, bool]) -> None:
    if optimizer is AMSGD and "fused" in kernels:
        pytest.skip("AMSGD has no fused form")
    pair = []
    for in_step in (False, True):
        params = make(torch.float32)
        ours = optimizer(params, lr=0.1, **kernels)
        for step in range(3):
            norm = clip_grad_norm_(ours, 0.5, in_step=in_step) if step < 2 else None  # the third step is not clipped
            ours.step()
            for i, param in enumerate(params[:-1]):
                param.grad = torch.full_like(param, 0.1 * (i + step + 1))
        pair.append((params, norm, ours.momentum()))
    (before, _, betas), (inside, _, others) = pair
    assert all(torch.equal(a, b) for a, b in zip(before, inside, strict=True))
    torch.testing.assert_close(betas, others, rtol=0, atol=0, equal_nan=True)


def test_zero_grad_takes_clipping_in_the_step_back() -> None:
    params = [torch.nn.Parameter(torch.zeros(3)) for _ in range(2)]
    one, two = (AMAdamW([param], lr=0.1, eps=1.0) for param in params)
    for optimizer, param in zip((one, two), params, strict=True):
        param.grad = torch.ones(3)
        if optimizer is one:
            clip_grad_norm_(one, 1e-3, in_step=True)  # a GradScaler may skip the following step
            one.zero_grad()
            param.grad = torch.ones(3)
        optimizer.step()
    assert torch.equal(*params) and params[0].abs().max() > 0
