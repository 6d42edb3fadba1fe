"""Shapes, strides and dtypes: tensors longer than a block, transposed tensors, mixed and low precision."""

from __future__ import annotations

import pytest
import torch

from tests.optim.harness import KERNELS, SCOPES, Bowl, Twin, build, make_oracle, named_params, run_bowl
from tests.optim.test_every_step import RATES

BIG = [(300_001,), (17, 3), (262_144,)]


def rates(kind: str, steps: int) -> list[tuple[float, ...]]:
    return [(RATES[kind][i % 5],) for i in range(steps)]


@pytest.mark.parametrize("foreach", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_longer_than_a_block(kind: str, dtype: torch.dtype, scope: str, foreach: bool | None) -> None:
    """300 001 elements are one full block of 256 Ki and an odd remainder; 262 144 are exactly one."""
    optimizer = build(kind, named_params(BIG, dtype), lr=0.1, weight_decay=0.01, scope=scope, foreach=foreach)
    twin = Twin(optimizer, make_oracle(optimizer, scope=scope), sync=dtype == torch.float32)
    run_bowl(twin, Bowl.around(BIG, seed=3), rates(kind, 4))
    twin.assert_not_vacuous()


def strided(shape: tuple[int, ...], order: tuple[int, ...], seed: int) -> torch.nn.Parameter:
    """Return a parameter of this shape whose memory order is ``order``."""
    gen = torch.Generator().manual_seed(seed)
    base = torch.randn([shape[i] for i in order], generator=gen, dtype=torch.float64)
    return torch.nn.Parameter(base.permute([order.index(i) for i in range(len(shape))]))


def scatter_strides(step: int, grads: list[torch.Tensor]) -> None:
    """Give every gradient other strides than its parameter's: transposed, with gaps, channels last."""
    for i, g in enumerate(grads):
        if g.dim() == 2 and step % 2:
            grads[i] = g.t().contiguous().t()
        elif g.dim() == 4:
            grads[i] = g.contiguous(memory_format=torch.channels_last) if step % 2 else g.contiguous()
        elif g.dim() == 1:
            gaps = torch.zeros(2 * g.numel(), dtype=g.dtype)
            gaps[::2] = g
            grads[i] = gaps[::2]


def with_odd_strides() -> tuple[list[tuple[int, ...]], list[torch.nn.Parameter]]:
    """Return shapes and parameters: transposed, contiguous, channels last, a vector, with gaps."""
    shapes = [(6, 5), (6, 5), (2, 3, 4, 5), (9,), (5, 4)]
    params = [
        strided(shapes[0], (1, 0), 0),
        strided(shapes[1], (0, 1), 1),
        strided(shapes[2], (0, 2, 3, 1), 2),
        strided(shapes[3], (0,), 3),
        torch.nn.Parameter(torch.randn(10, 8, dtype=torch.float64)[::2, ::2]),
    ]
    return shapes, params


@pytest.mark.parametrize("foreach", KERNELS)
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
@pytest.mark.parametrize("scope", SCOPES)
def test_strides_of_params_and_grads(kind: str, scope: str, foreach: bool | None) -> None:
    shapes, params = with_odd_strides()
    assert not params[0].is_contiguous() and not params[4].is_contiguous()
    strides = [p.stride() for p in params]
    optimizer = build(kind, params, lr=0.1, weight_decay=0.01, scope=scope, foreach=foreach)
    twin = Twin(optimizer, make_oracle(optimizer, scope=scope))
    run_bowl(twin, Bowl.around(shapes, seed=5), rates(kind, 12), scatter_strides)
    twin.assert_not_vacuous()
    assert [p.stride() for p in params] == strides


@pytest.mark.parametrize("foreach", KERNELS)
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_large_transposed_parameter(kind: str, foreach: bool | None) -> None:
    """The tensor is longer than a block and transposed, with contiguous gradients."""
    shape = (601, 501)
    optimizer = build(kind, [strided(shape, (1, 0), 0)], lr=0.1, weight_decay=0.01, scope="tensor", foreach=foreach)
    twin = Twin(optimizer, make_oracle(optimizer))
    run_bowl(twin, Bowl.around([shape], seed=6), rates(kind, 5))
    twin.assert_not_vacuous()


@pytest.mark.parametrize("foreach", KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_low_precision(kind: str, scope: str, dtype: torch.dtype, foreach: bool | None) -> None:
    """From the rounded state, beta must be right to 1e-5: arithmetic and sums have at least float32."""
    shapes = [(33, 7), (129,), (), (5,)]
    optimizer = build(kind, named_params(shapes, dtype), lr=0.1, weight_decay=0.01, scope=scope, foreach=foreach)
    twin = Twin(optimizer, make_oracle(optimizer, scope=scope), sync=True)
    run_bowl(twin, Bowl.around(shapes, seed=9), rates(kind, 15))
    twin.assert_not_vacuous()
    for p in twin.params:
        state = optimizer.state[p]
        moments = ("exp_avg", "exp_avg_sq") if kind == "adamw" else ("momentum_buffer",)
        assert all(state[m].dtype == dtype for m in moments)
        assert state["beta_prod"].dtype == torch.float32


@pytest.mark.parametrize("foreach", KERNELS)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_mixed_dtypes_in_one_optimizer(kind: str, scope: str, foreach: bool | None) -> None:
    dtypes = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float32]
    shapes = [(9,), (5, 5), (31,), (6, 2), ()]
    params = [
        (f"w{i}", torch.nn.Parameter(torch.randn(s, generator=torch.Generator().manual_seed(i)).to(t)))
        for i, (s, t) in enumerate(zip(shapes, dtypes, strict=True))
    ]
    groups = [{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.02}]
    optimizer = build(kind, groups, lr=0.1, weight_decay=0.01, scope=scope, foreach=foreach)
    twin = Twin(optimizer, make_oracle(optimizer, scope=scope), sync=True)
    run_bowl(twin, Bowl.around(shapes, seed=11), [(r, 0.8 * r) for (r,) in rates(kind, 15)])
    twin.assert_not_vacuous()
    assert optimizer.state[params[0][1]]["beta_prod"].dtype == torch.float64


@pytest.mark.parametrize("foreach", KERNELS)
def test_float16_eps_does_not_underflow(foreach: bool | None) -> None:
    """0 / (0 + 1e-8) is nan when P is formed in float16; zero gradients must give zero steps."""
    p = torch.nn.Parameter(torch.ones(4, dtype=torch.float16))
    optimizer = build("adamw", [p], lr=0.1, weight_decay=0.0, foreach=foreach)
    for _ in range(3):
        p.grad = torch.zeros(4, dtype=torch.float16)
        optimizer.step()
    assert torch.equal(p.detach(), torch.ones(4, dtype=torch.float16))


@pytest.mark.parametrize("foreach", KERNELS)
def test_sums_do_not_lose_small_terms(foreach: bool | None) -> None:
    """One float32 accumulator is off by 1e-3 in beta at this length; blocks summed in float64 are not."""
    n = 4_000_003
    gen = torch.Generator().manual_seed(1)
    p = torch.nn.Parameter(torch.randn(n, generator=gen))
    optimizer = build("sgd", [p], lr=0.5, scope="tensor", lambd=0.0, weight_decay=0.0, beta_max=1.0, foreach=foreach)
    twin = Twin(optimizer, make_oracle(optimizer))
    first = torch.randn(n, generator=gen) + 3.0
    twin.step([first])
    second = -0.3 * first + torch.randn(n, generator=gen)
    for group, mirror in zip(optimizer.param_groups, twin.oracle.groups, strict=True):
        group["lr"] = mirror["lr"] = 0.8
    p.grad = second
    twin.oracle.step([second.double().numpy()])
    optimizer.step()
    beta = float(next(iter(optimizer.momentum().values())))
    assert 0.0 < twin.oracle.slots[0].raw < 1.0
    assert abs(beta - twin.oracle.slots[0].beta) < 2e-7
