"""exp_avg_dtype=torch.bfloat16: exp_avg in half the memory, with unbiased and reproducible stochastic rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from am_lightning import AMAdamW, am_adamw
from am_lightning.optim.kernels import buckets as packs
from am_lightning.optim.kernels import rounding
from am_lightning.optim.kernels.rounding import seed_of, seeds_of, stochastic, stochastic_at
from tests.optim.harness import (
    Bowl,
    Twin,
    assert_bitwise,
    compile_on_cpu,
    make_oracle,
    named_params,
    run_bowl,
    snapshot,
)
from tests.optim.test_every_step import RATES

TIERS: dict[str, dict[str, Any]] = {
    "chunked": {"fused": False},
    "single_tensor": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
    "compile": {"fused": True},
}
each_tier = pytest.mark.parametrize(
    "tier", [name if name != "compile" else pytest.param(name, marks=pytest.mark.slow) for name in TIERS], indirect=True
)
SHAPES = [(33, 7), (3001,), (), (0,), (5,)]


@pytest.fixture
def tier(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "compile":
        compile_on_cpu(monkeypatch)
    return str(request.param)


def make(tier: str, params: Any = None, **options: Any) -> AMAdamW:
    params = named_params(SHAPES, torch.float32) if params is None else params
    return AMAdamW(params, lr=0.05, weight_decay=0.1, exp_avg_dtype=torch.bfloat16, **TIERS[tier], **options)


def step(optimizer: AMAdamW, index: int) -> None:
    generator = torch.Generator().manual_seed(index)
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.randn(p.shape, generator=generator) + 0.5 * p.detach()
    optimizer.step()


class Rounded(Twin):
    """Allow either neighbour, as stochastic rounding does: one unit in the last place of bfloat16."""

    def compare_stored(self, stored: torch.Tensor, expected: Any, what: str) -> None:
        if stored.dtype == torch.bfloat16:
            exact = torch.as_tensor(expected)
            assert bool(((stored.double() - exact).abs() <= 2.0**-7 * exact.abs() + 1e-6).all()), what
        else:
            super().compare_stored(stored, expected, what)


@each_tier
def test_each_step_against_float64(tier: str) -> None:
    """A step from the rounded state is exact to float32, except that exp_avg is rounded to a bfloat16 neighbour."""
    optimizer = make(tier)
    twin = Rounded(optimizer, make_oracle(optimizer), sync=True)
    run_bowl(twin, Bowl.around(SHAPES, seed=3), [(RATES["adamw"][i % 5],) for i in range(12)])
    twin.assert_not_vacuous(0.2)
    for p in twin.params:
        assert optimizer.state[p]["exp_avg"].dtype == torch.bfloat16
        assert optimizer.state[p]["exp_avg_sq"].dtype == optimizer.state[p]["beta"].dtype == torch.float32


@each_tier
def test_runs_repeat_and_resume_to_the_bit(tier: str) -> None:
    whole, again, half = make(tier), make(tier), make(tier)
    for index in range(4):
        step(whole, index)
        step(again, index)
        if index < 2:
            step(half, index)
    assert_bitwise(snapshot(whole), snapshot(again))
    named = [(f"w{i}", torch.nn.Parameter(p.detach().clone())) for i, p in enumerate(half.param_groups[0]["params"])]
    resumed = make(tier, named)
    saved = half.state_dict()
    assert saved["state"][0]["exp_avg"].dtype == torch.bfloat16
    resumed.load_state_dict(saved)
    for index in (2, 3):
        step(resumed, index)
    assert_bitwise(snapshot(resumed), snapshot(whole))


def test_tiers_round_alike() -> None:
    """All kernels use one hash: from one state they may differ only where the last bit of float32 decides."""
    stored = []
    for tier in ("chunked", "single_tensor", "foreach", "fused"):
        optimizer = make(tier)
        step(optimizer, 0)
        stored.append(torch.cat([s["exp_avg"].flatten() for s in optimizer.state.values()]))
    for other in stored[1:]:
        assert float((other != stored[0]).float().mean()) < 2e-3


def test_tiers_round_a_long_tensor_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tensor is walked in chunks and split. The noise of an element depends on its index in the whole tensor."""
    monkeypatch.setattr(packs, "_BUCKET_ELEMENTS_ON_CPU", 100_000)
    stored = []
    for tier in ("single_tensor", "chunked", "foreach", "fused"):
        optimizer = make(tier, named_params([(600_001,)], torch.float32))
        step(optimizer, 0)
        (state,) = optimizer.state.values()
        stored.append(state["exp_avg"])
    for other in stored[1:]:
        assert float((other != stored[0]).float().mean()) < 2e-3


def test_the_mean_of_many_roundings_is_the_number() -> None:
    """E[round(y)] = y within 5 standard errors; rounding to nearest gives the same neighbour every time."""
    y = torch.tensor([1.0 + 2.0**-10, -3.14159, 1e-20, 7.0, 1.0 + 2.0**-8 + 2.0**-20])
    unit = torch.tensor([2.0**-7, 2.0**-6, 2.0**-74, 2.0**-5, 2.0**-7])
    rounds = 2000
    total = torch.zeros(5, dtype=torch.float64)
    for t in range(rounds):
        total += stochastic(y, seed_of(torch.tensor(float(t)), 3)).double()
    error = (total / rounds - y.double()).abs()
    assert bool((error <= 5 * 0.5 * unit.double() / rounds**0.5).all()), error
    assert float(total[3]) == 7.0 * rounds, "what bfloat16 holds is not rounded"
    assert float(y[0].to(torch.bfloat16)) == 1.0, "to nearest this is always 1"


def test_noise_of_elements_rows_and_steps_is_not_correlated() -> None:
    y = torch.full((4096,), 1.0 + 2.0**-8)  # half way: up or down with equal chance
    draws = [stochastic(y, seed_of(torch.tensor(t), row)) > 1 for t, row in ((5.0, 1), (6.0, 1), (5.0, 2))]
    for i, a in enumerate(draws):
        assert abs(float(a.float().mean()) - 0.5) < 0.04
        assert abs(float((a[1:] == a[:-1]).float().mean()) - 0.5) < 0.04
        for b in draws[:i]:
            assert abs(float((a == b).float().mean()) - 0.5) < 0.04


def test_parts_of_a_tensor_round_like_the_whole() -> None:
    y = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    seed = seed_of(torch.tensor(7.0), 0)
    assert torch.equal(torch.cat([stochastic(y[:300], seed), stochastic(y[300:], seed, 300)]), stochastic(y, seed))


def test_blocks_of_several_rows_round_like_each_row() -> None:
    """Wrapping 32-bit arithmetic equals 64 bits, also if the index of an element has more than 32."""
    y = torch.randn(4, 256, generator=torch.Generator().manual_seed(0))
    rows, starts, steps = (
        torch.tensor([0, 0, 7, 300]),
        torch.tensor([0, 256, 2**31 - 100, 2**33 + 5]),
        [9.0, 9.0, 3.0, 1.0],
    )
    found = stochastic_at(y, seeds_of(torch.tensor(steps).long(), rows)[:, None], starts)
    for i, step_ in enumerate(steps):
        expected = stochastic(y[i], seed_of(torch.tensor(step_), int(rows[i])), int(starts[i]))
        assert torch.equal(found[i], expected)


@pytest.mark.parametrize("tier", ["chunked", "fused"], indirect=True)
def test_what_is_not_finite_stays(tier: str) -> None:
    p = torch.nn.Parameter(torch.ones(20))
    optimizer = make(tier, [p], nonfinite="propagate")
    p.grad = torch.ones(20)
    p.grad[3], p.grad[4] = float("nan"), float("inf")
    optimizer.step()
    stored = optimizer.state[p]["exp_avg"]
    assert not bool(torch.isfinite(stored[3:5]).any()) and bool(torch.isfinite(stored[5:]).all())


def test_nan_stays_nan_whatever_its_bits() -> None:
    """Noise that carries out of a mantissa of ones would make it zero. CUDA's own NaN has these bits."""
    nan = torch.tensor([0x7FFFFFFF, -1, 0x7FC00000, 0x7F800001, -0x7FFFFF], dtype=torch.int32).view(torch.float32)
    assert bool(nan.isnan().all())
    for t in range(20):
        seed = seed_of(torch.tensor(float(t)), 0)
        assert bool(stochastic(nan, seed).isnan().all())
        assert bool(stochastic_at(nan[None], seed.reshape(1, 1), torch.zeros(1, dtype=torch.int64)).isnan().all())
    infinite = torch.tensor([float("inf"), -float("inf")])
    assert torch.equal(stochastic(infinite, seed_of(torch.tensor(1.0), 0)), infinite.to(torch.bfloat16))


def test_a_large_tensor_is_rounded_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding, "_PART", 100)
    y = torch.randn(31, 17, generator=torch.Generator().manual_seed(0)).t()
    seed = seed_of(torch.tensor(7.0), 2)
    assert torch.equal(rounding.stochastic_in_parts(y, seed), stochastic(y, seed))


def test_small_changes_are_not_lost() -> None:
    """An average that gains 1/1000 of its distance per step would stop early if rounded to nearest."""
    exact, nearest, drawn = torch.zeros(()), torch.zeros((), dtype=torch.bfloat16), torch.zeros(4096)
    for t in range(2000):
        exact = exact + 0.001 * (1 - exact)
        nearest = (nearest.float() + 0.001 * (1 - nearest.float())).to(torch.bfloat16)
        drawn = stochastic(drawn + 0.001 * (1 - drawn), seed_of(torch.tensor(float(t)), 0)).float()
    assert float(exact) > 0.86 and float(nearest) < 0.3
    assert float(drawn.mean()) == pytest.approx(float(exact), abs=5e-3)


def test_beta_and_loss_follow_the_float32_run() -> None:
    runs = []
    for dtype in (None, torch.bfloat16):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.Tanh(), torch.nn.Linear(64, 4))
        optimizer = am_adamw(net, lr=3e-3, exp_avg_dtype=dtype)
        generator = torch.Generator().manual_seed(1)
        teacher = torch.randn(16, 4, generator=generator)
        losses, betas = [], []
        for _ in range(150):
            x = torch.randn(64, 16, generator=generator)
            loss = torch.nn.functional.mse_loss(net(x), torch.tanh(x @ teacher))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
            betas.append([float(b) for b in optimizer.momentum().values()])
        runs.append((torch.tensor(losses), torch.tensor(betas)))
    (loss, beta), (low_loss, low_beta) = runs
    assert float(low_loss[-50:].mean()) == pytest.approx(float(loss[-50:].mean()), rel=0.02)
    assert float((low_beta[-100:].mean(0) - beta[-100:].mean(0)).abs().max()) < 0.02


def test_checkpoints_of_adamw_and_of_both_dtypes_load() -> None:
    low, plain = make("chunked"), AMAdamW(named_params(SHAPES, torch.float32))
    adamw = torch.optim.AdamW([p.detach().clone().requires_grad_() for _, p in named_params(SHAPES, torch.float32)])
    for optimizer in (low, plain, adamw):
        for index in range(2):
            step(optimizer, index)  # type: ignore[arg-type]
    for saved in (plain, adamw):
        other = make("chunked")
        other.load_state_dict(saved.state_dict())
        step(other, 2)
        assert all(s["exp_avg"].dtype == torch.bfloat16 for s in other.state.values())
    back = AMAdamW(named_params(SHAPES, torch.float32))
    back.load_state_dict(low.state_dict())
    for p, q in zip(back.param_groups[0]["params"], low.param_groups[0]["params"], strict=True):
        assert back.state[p]["exp_avg"].dtype == torch.float32
        assert torch.equal(back.state[p]["exp_avg"], low.state[q]["exp_avg"].float())


def test_other_dtypes_of_parameters_keep_theirs() -> None:
    params = [torch.nn.Parameter(torch.ones(3, dtype=t)) for t in (torch.float64, torch.float16, torch.bfloat16)]
    optimizer = make("chunked", params)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert [optimizer.state[p]["exp_avg"].dtype for p in params] == [torch.float64, torch.float16, torch.bfloat16]
