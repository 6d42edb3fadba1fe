"""beta_t and the new direction against a brute-force solve of the two-plane subproblem (see subproblem.py)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.optim.harness import build, to_numpy
from tests.optim.subproblem import Subproblem

N = 5
LAMBDAS = [0.0, 0.1, 1.5]
RATES = [1.0, 0.5, 0.9, 0.3, 0.6]


def gradient(rng: np.random.Generator, memory: np.ndarray, i: int) -> np.ndarray:
    """Every third gradient opposes the memory, so that betas fall inside the clip."""
    return rng.normal(size=N) - (0.8 * memory if i % 3 else -0.5 * memory)


def check(optimizer, p: torch.Tensor, sub: Subproblem, cap: float, key: str) -> bool:
    """Compare beta and direction with the brute force; return whether beta is strictly inside the clip."""
    beta = float(optimizer.momentum()["p"])
    best, exact = sub.golden(cap), sub.vertex(cap)
    assert beta == pytest.approx(best, abs=2e-6)
    assert beta == pytest.approx(exact, abs=1e-8)
    direction = to_numpy(optimizer.state[p][key])
    np.testing.assert_allclose(direction, sub.inner(best), atol=1e-4)
    np.testing.assert_allclose(direction, sub.inner(exact), atol=1e-8)
    # No other blend in the model's range is better: the dual value is at its maximum.
    assert all(sub.value(b) <= sub.value(beta) + 1e-9 for b in np.linspace(0.0, cap, 21))
    if cap == 1.0:
        assert sub.primal(direction) == pytest.approx(sub.value(beta), abs=1e-8)
    return 1e-3 < beta < cap - 1e-3


@pytest.mark.parametrize("lam", LAMBDAS)
@pytest.mark.parametrize("decay", ["none", "coupled", "decoupled"])
def test_sgd_solves_the_two_plane_problem(lam: float, decay: str) -> None:
    """Primal: identity metric, first-order gap, the exact max (cap 1); coupled decay is part of g."""
    rng = np.random.default_rng(0)
    p = torch.nn.Parameter(torch.tensor(rng.normal(size=N)))
    wd = 0.0 if decay == "none" else 0.3
    options = {"beta_max": 1.0, "weight_decay": wd, "decoupled_weight_decay": decay == "decoupled", "lambd": lam}
    optimizer = build("sgd", [("p", p)], **options)
    interior, eta_before = 0, 0.0
    for i in range(9):
        eta = optimizer.param_groups[0]["lr"] = rng.uniform(0.1, 0.8)
        x = to_numpy(p)
        d = to_numpy(optimizer.state[p]["momentum_buffer"]) if i else np.zeros(N)
        raw = gradient(rng, d, i)
        p.grad = torch.tensor(raw)
        optimizer.step()
        g = raw + wd * x if decay == "coupled" else raw
        mu = wd if decay == "decoupled" else 0.0
        if i:
            delta = eta_before * float(g @ (d + mu * x))
            sub = Subproblem(g, d, x, np.ones(N), eta, mu, lam, delta)
            interior += check(optimizer, p, sub, 1.0, "momentum_buffer")
            if mu == 0.0:  # then the optimizer's step is the model's own step
                np.testing.assert_allclose(to_numpy(p) - x, sub.move(sub.inner(sub.vertex(1.0))), atol=1e-8)
        eta_before = eta
    assert interior >= 2


@pytest.mark.parametrize("cap", [0.4, 0.7])
@pytest.mark.parametrize("wd", [0.0, 0.3])
@pytest.mark.parametrize("lam", LAMBDAS)
def test_adamw_solves_the_capped_two_plane_problem(lam: float, wd: float, cap: float) -> None:
    """Primal: metric P of AdamW, first-order gap, memory plane weighted at most by ``cap``."""
    rng = np.random.default_rng(1)
    p = torch.nn.Parameter(torch.tensor(rng.normal(size=N)))
    curvature, beta2, eps = rng.uniform(0.2, 1.0, N), 0.9, 1e-3
    optimizer = build("adamw", [("p", p)], betas=(cap, beta2), eps=eps, weight_decay=wd, lambd=lam)
    interior, eta_before, product = 0, 0.0, 1.0
    v, d = np.zeros(N), np.zeros(N)
    for i in range(12):
        eta = optimizer.param_groups[0]["lr"] = RATES[i % 5]
        x = to_numpy(p)
        g = curvature * x + 0.2 * rng.normal(size=N)  # an overshooting bowl
        p.grad = torch.tensor(g)
        optimizer.step()
        v = beta2 * v + (1 - beta2) * g**2
        metric = (1 - cap * product) * (np.sqrt(v / (1 - beta2 ** (i + 1))) + eps)
        if i:
            delta = eta_before * float(g @ (d / metric + wd * x))
            sub = Subproblem(g, d, x, metric, eta, wd, lam, delta)
            interior += check(optimizer, p, sub, cap, "exp_avg")
            if wd == 0.0:
                np.testing.assert_allclose(to_numpy(p) - x, sub.move(sub.inner(sub.vertex(cap))), atol=1e-8)
        d, eta_before = to_numpy(optimizer.state[p]["exp_avg"]), eta
        product *= float(optimizer.momentum()["p"])
    assert interior >= 2


@pytest.mark.parametrize("decay", ["none", "coupled", "decoupled"])
@pytest.mark.parametrize("lam", LAMBDAS)
def test_sgd_with_the_exact_gap_solves_the_two_plane_problem(lam: float, decay: str) -> None:
    """Primal: the memory plane passes through the previous loss itself, without a first-order estimate."""
    rng = np.random.default_rng(2)
    a = rng.normal(size=(N, N))
    hessian, c = torch.tensor(a @ a.T / N + 0.3 * np.eye(N)), torch.tensor(rng.normal(size=N))
    p = torch.nn.Parameter(torch.tensor(rng.normal(size=N)) + 2.0)
    wd = 0.0 if decay == "none" else 0.2
    options = {"beta_max": 1.0, "weight_decay": wd, "decoupled_weight_decay": decay == "decoupled", "lambd": lam}
    optimizer = build("sgd", [("p", p)], loss_gap="exact", **options)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = 0.5 * (p - c) @ hessian @ (p - c)
        loss.backward()
        return loss

    interior, f_before = 0, 0.0
    for i in range(12):
        eta = optimizer.param_groups[0]["lr"] = rng.uniform(0.6, 1.2)
        x = to_numpy(p)
        d = to_numpy(optimizer.state[p]["momentum_buffer"]) if i else np.zeros(N)
        f = float(optimizer.step(closure).detach())
        assert p.grad is not None
        g, mu = to_numpy(p.grad), wd if decay == "decoupled" else 0.0
        if decay == "coupled":
            f, g = f + 0.5 * wd * float(x @ x), g + wd * x
        if i:
            sub = Subproblem(g, d, x, np.ones(N), eta, mu, lam, f_before - f)
            interior += check(optimizer, p, sub, 1.0, "momentum_buffer")
        f_before = f
    assert interior >= 2


def test_both_planes_are_active_at_an_interior_beta() -> None:
    """At 0 < beta < 1 the step u lies where the planes cross, <g, u> = Delta + <d, u>, with Delta = -<g, u before>."""
    rng = np.random.default_rng(3)
    p = torch.nn.Parameter(torch.tensor(rng.normal(size=N)))
    optimizer = build("sgd", [("p", p)], weight_decay=0.0, lambd=0.2, beta_max=1.0)
    seen, before = 0, np.zeros(N)
    for i in range(30):
        optimizer.param_groups[0]["lr"] = rng.uniform(0.1, 0.8)
        d = to_numpy(optimizer.state[p]["momentum_buffer"]) if i else np.zeros(N)
        x, g = to_numpy(p), gradient(rng, d, i)
        p.grad = torch.tensor(g)
        optimizer.step()
        u = to_numpy(p) - x
        if i and 1e-6 < float(optimizer.momentum()["p"]) < 1 - 1e-6:
            assert float(g @ u) == pytest.approx(float(d @ u) - float(g @ before), abs=1e-10)
            seen += 1
        before = u
    assert seen >= 5
