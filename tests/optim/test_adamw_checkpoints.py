"""AdamW state_dicts into AMAdamW and back, and the first step by which torch.distributed.checkpoint creates a state."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from am_lightning import AMSGD, AMAdamW
from tests.optim.harness import (
    KERNELS,
    Bowl,
    Twin,
    as_grads,
    assert_bitwise,
    assert_close,
    make_oracle,
    named_params,
    params_of,
    run_bowl,
    snapshot,
    to_numpy,
)

SHAPES = [(6, 4), (9,), ()]


def groups_of(params: list[Any], **first: Any) -> list[dict[str, Any]]:
    return [{"params": params[:2], "weight_decay": 0.1, **first}, {"params": params[2:], "weight_decay": 0.0}]


def train(optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        gen = torch.Generator().manual_seed(step)
        for p in params_of(optimizer):
            noise = torch.randn(p.shape, generator=gen, dtype=torch.float64).to(p.dtype)
            p.grad = 0.7 * p.detach() + 0.1 * noise
        optimizer.step()


@pytest.mark.parametrize("foreach", KERNELS)
@pytest.mark.parametrize("live_cap", [0.9, 0.5])
@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_adamw_state_loads_mid_run(scope: str, live_cap: float, foreach: bool | None) -> None:
    """The next steps are the oracle's with prod beta = 0.9 ** step and the checkpoint's lr as eta_{t-1}."""
    params = named_params(SHAPES, torch.float64)
    adamw = torch.optim.AdamW(groups_of(params), lr=0.3, betas=(0.9, 0.95), eps=1e-6)
    train(adamw, range(5))
    state = copy.deepcopy(adamw.state_dict())

    optimizer = AMAdamW(groups_of(params), lr=1.0, betas=(live_cap, 0.5), scope=scope, foreach=foreach)
    optimizer.load_state_dict(state)
    for group in optimizer.param_groups:
        assert group["betas"] == (live_cap, 0.95) and group["beta1_max"] == live_cap
        assert group["lr"] == 0.3 and group["eps"] == 1e-6 and group["lambd"] == 0.1
    assert all(float(b) == live_cap for b in optimizer.momentum().values())
    assert all(float(state["prev_lr"]) == 0.3 for state in optimizer.state.values())

    twin = Twin(optimizer, make_oracle(optimizer, scope=scope))
    for p, slot in zip(twin.params, twin.oracle.slots, strict=True):
        slot.d, slot.v = to_numpy(optimizer.state[p]["exp_avg"]), to_numpy(optimizer.state[p]["exp_avg_sq"])
        slot.step, slot.beta_prod, slot.prev_lr = 5, 0.9**5, 0.3
    run_bowl(twin, Bowl.around(SHAPES, seed=4), [(r, 0.5 * r) for r in (0.6, 1.0, 0.5, 0.9, 0.3) * 2])
    twin.assert_not_vacuous(0.15)


def test_adamw_checkpoint_of_an_older_layout() -> None:
    """Old checkpoints have float steps and lack newer keys; a tensor that was not stepped has no state."""
    params = named_params(SHAPES, torch.float32)
    adamw = torch.optim.AdamW(groups_of(params), lr=0.3, betas=(0.9, 0.95))
    for _, p in params[:2]:
        p.grad = torch.ones_like(p)
    adamw.step()
    state = copy.deepcopy(adamw.state_dict())
    for entry in state["state"].values():
        entry["step"] = float(entry["step"])
    for group in state["param_groups"]:
        for key in ("foreach", "capturable", "fused", "maximize", "differentiable", "decoupled_weight_decay"):
            group.pop(key, None)
    optimizer = AMAdamW(groups_of(params), betas=(0.9, 0.999))
    optimizer.load_state_dict(state)
    betas = list(optimizer.momentum().values())
    assert [float(b) for b in betas[:2]] == pytest.approx([0.9, 0.9]) and bool(torch.isnan(betas[2]))
    train(optimizer, range(2))
    assert [float(optimizer.state[p]["step"]) for p in params_of(optimizer)] == [3.0, 3.0, 2.0]


def test_bfloat16_adamw_state_gets_wide_scalars() -> None:
    """0.9 ** 40 in bfloat16 would be off by a percent."""
    params = named_params(SHAPES, torch.bfloat16)
    adamw = torch.optim.AdamW(params, lr=0.01, betas=(0.9, 0.95))
    train(adamw, range(40))
    optimizer = AMAdamW(params, betas=(0.9, 0.95))
    optimizer.load_state_dict(copy.deepcopy(adamw.state_dict()))
    train(optimizer, range(40, 41))
    for p in params_of(optimizer):
        state = optimizer.state[p]
        expected = 0.9**40 * float(state["beta"])
        assert state["beta_prod"].dtype == torch.float32
        assert float(state["beta_prod"]) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_amadamw_state_loads_into_adamw(dtype: torch.dtype, foreach: bool) -> None:
    """Plain AdamW continues from these moments, and our additional state does not disturb it."""
    params = named_params(SHAPES, dtype)
    mine = AMAdamW(groups_of(params), lr=0.3, betas=(0.8, 0.95), foreach=foreach)
    train(mine, range(5))
    state = copy.deepcopy(mine.state_dict())

    loaded = torch.optim.AdamW(groups_of(named_params(SHAPES, dtype)), lr=1.0)
    plain = torch.optim.AdamW(groups_of(named_params(SHAPES, dtype)), lr=0.3, betas=(0.8, 0.95), foreach=foreach)
    loaded.load_state_dict(state)
    for source, p, q in zip(params_of(mine), params_of(loaded), params_of(plain), strict=True):
        with torch.no_grad():
            p.copy_(source)
            q.copy_(source)
        plain.state[q] = {k: mine.state[source][k].clone() for k in ("step", "exp_avg", "exp_avg_sq")}
    for step in range(5, 9):
        train(loaded, range(step, step + 1))
        train(plain, range(step, step + 1))
        for p, q in zip(params_of(loaded), params_of(plain), strict=True):
            assert torch.equal(p, q)
    for p in params_of(loaded):
        assert float(loaded.state[p]["step"]) == 9.0


def test_round_trip_through_adamw_is_seen_as_a_full_state() -> None:
    """AMAdamW -> AdamW -> AMAdamW: AdamW keeps our scalars unchanged, and they are used as they are."""
    params = named_params(SHAPES, torch.float64)
    mine = AMAdamW(groups_of(params), lr=0.3, betas=(0.8, 0.95))
    train(mine, range(5))
    carrier = torch.optim.AdamW(groups_of(named_params(SHAPES, torch.float64)))
    carrier.load_state_dict(copy.deepcopy(mine.state_dict()))
    back = AMAdamW(groups_of([(n, torch.nn.Parameter(p.detach().clone())) for n, p in params]), betas=(0.8, 0.95))
    back.load_state_dict(copy.deepcopy(carrier.state_dict()))
    train(mine, range(5, 8))
    train(back, range(5, 8))
    assert_bitwise(snapshot(mine), snapshot(back))


def make(kind: str, model: torch.nn.Module, lr: float = 0.1) -> torch.optim.Optimizer:
    if kind == "adamw":
        return AMAdamW(model.named_parameters(), lr=lr, weight_decay=0.1)
    return AMSGD(model.named_parameters(), lr=lr, weight_decay=0.1)


def small_model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.LayerNorm(3), torch.nn.Linear(3, 2)).double()


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_phantom_step_leaves_no_trace(kind: str) -> None:
    """lr 0 and zero gradients on a fresh optimizer give zero moments, step 0 and beta_prod 1; the run is unchanged."""
    touched, fresh = make(kind, small_model()), make(kind, small_model())
    for group in touched.param_groups:
        group["lr"] = 0.0
    for p in params_of(touched):
        p.grad = torch.zeros_like(p)
    weights = [p.detach().clone() for p in params_of(touched)]
    touched.step()
    assert_bitwise([p.detach() for p in params_of(touched)], weights)
    for p in params_of(touched):
        state = touched.state[p]
        assert float(state["step"]) == 0.0 and float(state["beta_prod"]) == 1.0
        assert all(not v.any() for k, v in state.items() if k in ("exp_avg", "exp_avg_sq", "momentum_buffer"))
    assert all(torch.isnan(b) for b in touched.momentum().values())
    for group in touched.param_groups:
        group["lr"] = 0.1
    train(touched, range(4))
    train(fresh, range(4))
    assert_bitwise(snapshot(touched), snapshot(fresh))


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_distributed_checkpoint_save_and_load(kind: str) -> None:
    """Use the real get / set of torch.distributed.checkpoint, before the first step and during a run."""
    model, reference = small_model(), small_model()
    optimizer, straight = make(kind, model), make(kind, reference)
    get_optimizer_state_dict(model, optimizer)
    train(optimizer, range(3))
    train(straight, range(3))
    assert_bitwise(snapshot(optimizer), snapshot(straight))

    saved = get_optimizer_state_dict(model, optimizer)
    other = small_model()
    other.load_state_dict(model.state_dict())
    resumed = make(kind, other)
    set_optimizer_state_dict(other, resumed, copy.deepcopy(saved))
    train(resumed, range(3, 6))
    train(straight, range(3, 6))
    assert_bitwise(snapshot(resumed), snapshot(straight))


@pytest.mark.parametrize("foreach", KERNELS)
@pytest.mark.parametrize("scope", ["tensor", "group", "global"])
def test_a_first_step_at_lr_zero_with_gradients_counts(scope: str, foreach: bool | None) -> None:
    """Warmup from lr 0 makes a real first step, as in AdamW, also for a tensor whose own gradient is zero."""
    optimizer = AMAdamW(groups_of(named_params(SHAPES, torch.float64)), lr=0.0, scope=scope, foreach=foreach)
    twin = Twin(optimizer, make_oracle(optimizer, scope=scope))

    def one_is_zero(step: int, grads: list[torch.Tensor]) -> None:
        if step == 0:
            grads[1].zero_()

    weights = [p.detach().clone() for p in twin.params]
    run_bowl(twin, Bowl.around(SHAPES, seed=4), [(0.0, 0.0)], one_is_zero)
    assert_bitwise([p.detach() for p in twin.params], weights)
    assert all(float(optimizer.state[p]["step"]) == 1.0 for p in twin.params)
    run_bowl(twin, Bowl.around(SHAPES, seed=5), [(0.5, 0.5), (0.9, 0.3), (0.4, 0.8)])


@pytest.mark.parametrize("foreach", KERNELS)
@pytest.mark.parametrize("lrs", [(0.0, 0.0), (0.1, 0.0), (0.0, 0.1)])
@pytest.mark.parametrize("zero", [0, 2, None])
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_any_gradient_makes_a_first_step_at_lr_zero_count(
    kind: str, zero: int | None, lrs: tuple[float, float], foreach: bool | None
) -> None:
    """The step counts whichever group has the gradient, with or without decay, and whatever the other group's lr is."""
    cls = AMAdamW if kind == "adamw" else AMSGD
    optimizer = cls(groups_of(named_params(SHAPES, torch.float64)), lr=0.0, scope="tensor", foreach=foreach)
    twin = Twin(optimizer, make_oracle(optimizer, scope="tensor"))

    def spare(step: int, grads: list[torch.Tensor]) -> None:
        for i, g in enumerate(grads):
            if step == 0 and zero is not None and (i < 2) == (zero < 2):
                g.zero_()

    run_bowl(twin, Bowl.around(SHAPES, seed=4), [lrs], spare)
    assert all(float(optimizer.state[p]["step"]) == 1.0 for p in twin.params)
    run_bowl(twin, Bowl.around(SHAPES, seed=5), [(0.5, 0.5), (0.9, 0.3), (0.4, 0.8)])


def test_a_first_step_at_lr_zero_is_adamws() -> None:
    """At the cap with lambda = 0 the warmup from lr 0 equals AdamW's, moments and counters included."""
    results = []
    for cls, extra in ((AMAdamW, {"lambd": 0.0}), (torch.optim.AdamW, {})):
        optimizer = cls(named_params(SHAPES, torch.float64), lr=0.0, betas=(0.05, 0.99), **extra)
        for lr in (0.0, 0.01, 0.02, 0.03):
            for group in optimizer.param_groups:
                group["lr"] = lr
            for p in params_of(optimizer):
                p.grad = torch.ones_like(p)
            optimizer.step()
        results.append([to_numpy(p) for p in params_of(optimizer)])
    for a, b in zip(*results, strict=True):
        assert_close(a, b, 1e-12, "weights")


def test_zero_gradients_at_a_positive_lr_count() -> None:
    optimizer = AMAdamW(named_params(SHAPES, torch.float64), lr=0.1)
    twin = Twin(optimizer, make_oracle(optimizer))
    twin.step(as_grads([to_numpy(p) * 0 for p in twin.params], twin.params))
    assert all(float(optimizer.state[p]["step"]) == 1.0 for p in twin.params)
    run_bowl(twin, Bowl.around(SHAPES, seed=5), [(0.5,), (0.9,), (0.4,)])
