"""Every step of both optimizers against the five-sum float64 oracle: weights, moments, counters and beta_t."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.optim.harness import KERNELS, SCOPES, Bowl, Twin, as_grads, build, make_oracle, named_params, run_bowl

SHAPES = [(7, 5), (13,), (), (1,), (0,), (4, 3, 3)]
# Jumping rates overshoot the bowl, so that betas fall inside the clip. A rate of 0.0 is a schedule's end or pause.
RATES = {"adamw": [1.0, 0.5, 0.9, 0.3, 0.6], "sgd": [1.9, 1.5, 0.5, 1.2, 1.7]}
STEPS = 20

# name -> (options of the first group, options of the second). Together the groups override every option of a group.
VARIANTS: dict[str, dict[str, tuple[dict[str, Any], dict[str, Any]]]] = {
    "adamw": {
        "paper": ({}, {}),
        "lambda0": ({"lambd": 0.0, "weight_decay": 0.0}, {"lambd": 0.0, "weight_decay": 0.1}),
        "groups": (
            {"betas": (0.95, 0.9), "eps": 1e-3, "weight_decay": 0.2, "lambd": 0.3},
            {"betas": (0.6, 0.99), "eps": 1e-8, "weight_decay": 0.0, "lambd": 0.05},
        ),
        "maximize": ({"maximize": True}, {"maximize": True, "weight_decay": 0.0}),
    },
    "sgd": {
        "paper": ({}, {}),
        "lambda0": ({"lambd": 0.0}, {"lambd": 0.0, "weight_decay": 0.05}),
        "groups": (
            {"beta_max": 1.0, "weight_decay": 0.02, "lambd": 0.3},
            {"beta_max": 0.6, "weight_decay": 0.0, "lambd": 0.05},
        ),
        "maximize": ({"maximize": True, "weight_decay": 0.05}, {"maximize": True}),
        "decoupled": (
            {"decoupled_weight_decay": True, "weight_decay": 0.1},
            {"decoupled_weight_decay": True, "weight_decay": 0.03},
        ),
    },
}
CASES = [(kind, variant) for kind, variants in VARIANTS.items() for variant in variants]


def make_twin(
    kind: str, variant: str, scope: str, *, foreach: bool | None, dtype: torch.dtype = torch.float64, **kwargs: Any
) -> Twin:
    params = named_params(SHAPES, dtype)
    first, second = VARIANTS[kind][variant]
    groups = [{"params": params[:4], "lr": 0.1, **first}, {"params": params[4:], "lr": 0.1, **second}]
    optimizer = build(kind, groups, scope=scope, foreach=foreach, **kwargs)
    return Twin(optimizer, make_oracle(optimizer, scope=scope))


def schedule(kind: str) -> list[tuple[float, float]]:
    """Return two groups on two rates, both 0 at step 11."""
    rates = [RATES[kind][i % 5] for i in range(STEPS)]
    return [(r, 0.7 * r) if i != 11 else (0.0, 0.0) for i, r in enumerate(rates)]


def drop_some(step: int, grads: list[Any]) -> None:
    """Remove gradients: one tensor joins late, one pauses, a whole group is absent once."""
    if step < 3:
        grads[1] = None
    if step in (6, 7):
        grads[0] = None
    if step == 14:
        grads[4] = grads[5] = None


@pytest.mark.parametrize("foreach", KERNELS)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(("kind", "variant"), CASES)
def test_float64(kind: str, variant: str, scope: str, foreach: bool | None) -> None:
    twin = make_twin(kind, variant, scope, foreach=foreach)
    run_bowl(twin, Bowl.around(SHAPES, seed=7), schedule(kind), drop_some)
    twin.assert_not_vacuous()


@pytest.mark.parametrize("foreach", KERNELS)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(("kind", "variant"), CASES)
def test_float32(kind: str, variant: str, scope: str, foreach: bool | None) -> None:
    twin = make_twin(kind, variant, scope, foreach=foreach, dtype=torch.float32)
    run_bowl(twin, Bowl.around(SHAPES, seed=7), schedule(kind), drop_some)
    twin.assert_not_vacuous()


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("scope", SCOPES)
def test_capturable_with_a_tensor_lr(scope: str, foreach: bool) -> None:
    """A tensor lr keeps its value on the device, and fill_ changes it between steps."""
    lr = torch.tensor(0.5, dtype=torch.float64)
    params = named_params(SHAPES, torch.float64)
    groups = [{"params": params[:4]}, {"params": params[4:], "weight_decay": 0.0}]
    optimizer = build("adamw", groups, lr=lr, scope=scope, foreach=foreach, capturable=True)
    twin = Twin(optimizer, make_oracle(optimizer, scope=scope))
    bowl = Bowl.around(SHAPES, seed=8)
    for i in range(12):
        lr.fill_(RATES["adamw"][i % 5] if i != 6 else 0.0)
        for mirror in twin.oracle.groups:
            mirror["lr"] = float(lr)
        twin.step(as_grads(bowl.grads([s.x for s in twin.oracle.slots]), twin.params))
    assert all(isinstance(g["lr"], torch.Tensor) for g in optimizer.param_groups)
    twin.assert_not_vacuous()


@pytest.mark.parametrize("capturable", [False, True])
def test_tensor_lr_in_the_default_kernel(capturable: bool) -> None:
    lr = torch.tensor(0.5, dtype=torch.float64)
    optimizer = build("adamw", named_params(SHAPES, torch.float64), lr=lr, capturable=capturable)
    twin = Twin(optimizer, make_oracle(optimizer))
    bowl = Bowl.around(SHAPES, seed=8)
    for i in range(8):
        lr.fill_(RATES["adamw"][i % 5])
        twin.oracle.groups[0]["lr"] = float(lr)
        twin.step(as_grads(bowl.grads([s.x for s in twin.oracle.slots]), twin.params))
    twin.assert_not_vacuous()


@pytest.mark.parametrize("foreach", KERNELS)
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_zero_difference_gives_beta_zero(kind: str, foreach: bool | None) -> None:
    """If d == g everywhere (S1 == 0) after the first step, the beta of that scope is 0, and nothing becomes nan."""
    params = named_params([(3,), (2, 2)], torch.float64)
    optimizer = build(kind, params, lr=0.1, weight_decay=0.0, scope="tensor", foreach=foreach)
    twin = Twin(optimizer, make_oracle(optimizer))
    gen = torch.Generator().manual_seed(0)
    for _ in range(3):
        # With zeros only, d stays 0 = g under AM-AdamW. Under AM-SGD the direction is g from the start.
        twin.step([torch.zeros(3, dtype=torch.float64), torch.randn(2, 2, generator=gen, dtype=torch.float64)])
    betas = list(optimizer.momentum().values())
    assert float(betas[0]) == 0.0
    assert torch.isfinite(params[0][1]).all()


@pytest.mark.parametrize("foreach", KERNELS)
def test_sgd_constant_gradient_is_beta_zero(foreach: bool | None) -> None:
    """d_0 = g_0 and the same gradient again make d - g exactly zero with non-zero gradients."""
    params = named_params([(3,)], torch.float64)
    optimizer = build("sgd", params, lr=0.25, weight_decay=0.0, lambd=0.0, foreach=foreach)
    start = params[0][1].detach().clone()
    for i in range(3):
        params[0][1].grad = torch.ones(3, dtype=torch.float64)
        optimizer.step()
        assert float(optimizer.momentum()["w0"]) == 0.0
        torch.testing.assert_close(params[0][1].detach(), start - 0.25 * (i + 1), rtol=0, atol=1e-15)


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_no_gradient_at_all(kind: str) -> None:
    """A step without any gradient changes nothing and is not a skipped step."""
    params = named_params([(3,), (2,)], torch.float64)
    optimizer = build(kind, params, lr=0.1, scope="tensor")
    twin = Twin(optimizer, make_oracle(optimizer, scope="tensor"))
    twin.step([None, None])
    assert all(torch.isnan(b) for b in optimizer.momentum().values())
    twin.step([torch.ones(3, dtype=torch.float64), None])
    twin.step([None, None])
