"""The oracle itself, checked against independent statements of the method before anything is checked against it."""

from __future__ import annotations

import numpy as np
import pytest

from tests.optim.oracle import OracleAdamW, OracleSGD
from tests.optim.subproblem import Subproblem


def random_state(kind: str, rng: np.random.Generator, *, lam: float, wd: float, decoupled: bool = False, scope: str):
    options = {"lr": rng.uniform(0.05, 1.0), "weight_decay": wd, "lambd": lam, "cap": 1.0 if kind == "sgd" else 0.6}
    options |= {"maximize": False, "decoupled": decoupled, "beta2": 0.95, "eps": 1e-8}
    shapes = [(3,), (2, 2)]
    cls = OracleSGD if kind == "sgd" else OracleAdamW
    oracle = cls([{"params": [rng.normal(size=s) for s in shapes], **options}], scope=scope)
    oracle.step([rng.normal(size=s) for s in shapes])
    oracle.groups[0]["lr"] = rng.uniform(0.05, 1.0)
    oracle.step([rng.normal(size=s) for s in shapes])
    return oracle, [rng.normal(size=s) for s in shapes]


def two_sums(kind: str, oracle, grads, members) -> tuple[float, float]:
    """Return N and D of the derived two-sum form, as an independent check of the five sums."""
    n = d = 0.0
    for i in members:
        slot, group = oracle.slots[i], oracle.groups[0]
        g = oracle.gradient(slot, grads[i])
        p = oracle.metric(slot, g)[1]
        mu, lr = oracle.mu(group), group["lr"]
        k = (1 + mu * lr) * slot.prev_lr / lr
        n += float(((slot.d - (1 + k) * g) * (slot.d / p + mu * slot.x)).sum())
        d += float(((slot.d - g) ** 2 / (p * (1 + group["lambd"] * p))).sum())
    return n, d


@pytest.mark.parametrize("scope", ["tensor", "global"])
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_five_sums_agree_with_the_two_sum_identity(kind: str, scope: str) -> None:
    rng = np.random.default_rng(1)
    for lam, wd, decoupled in [(0.0, 0.0, False), (0.1, 0.2, True), (0.7, 0.3, False), (0.3, 0.0, True)]:
        for _ in range(10):
            oracle, grads = random_state(kind, rng, lam=lam, wd=wd, decoupled=decoupled, scope=scope)
            sums = [two_sums(kind, oracle, grads, [i] if scope == "tensor" else [0, 1]) for i in range(2)]
            oracle.step(grads)
            for slot, (n, d) in zip(oracle.slots, sums, strict=True):
                assert slot.raw == pytest.approx(1.0 - n / d, rel=1e-11, abs=1e-11)


def test_sgd_agrees_with_its_own_published_formula() -> None:
    """Section 2 divides by |d-g|^2 and has no metric; the oracle weights by M = 1/(1 + lambda)."""
    rng = np.random.default_rng(2)
    for lam in (0.0, 0.1, 2.0):
        oracle, grads = random_state("sgd", rng, lam=lam, wd=0.3, scope="global")
        top = bottom = 0.0
        for slot, grad in zip(oracle.slots, grads, strict=True):
            g, d = grad + 0.3 * slot.x, slot.d
            gap = slot.prev_lr / oracle.groups[0]["lr"] * (g * d).sum()
            top += (1 + lam) * gap - ((d - g) * (g + lam * d)).sum()
            bottom += ((d - g) ** 2).sum()
        oracle.step(grads)
        assert oracle.slots[0].raw == pytest.approx(top / bottom, rel=1e-12)


@pytest.mark.parametrize("wd", [0.0, 0.4])
@pytest.mark.parametrize("lam", [0.0, 0.5])
def test_duality_gap_of_the_brute_force_solution_is_zero(lam: float, wd: float) -> None:
    """The best blend reaches the primal value, which certifies the brute force without any formula."""
    rng = np.random.default_rng(3)
    interior = 0
    for _ in range(12):
        g, d, x = rng.normal(size=(3, 4))
        p = rng.uniform(0.3, 3.0, 4)
        sub = Subproblem(g, d, x, p, eta=0.3, mu=wd, lam=lam, delta=rng.normal() * 0.3)
        b = sub.golden(1.0)
        interior += 1e-3 < b < 1 - 1e-3
        memory = sub.inner(b)
        assert b == pytest.approx(sub.vertex(1.0), abs=1e-6)
        assert sub.primal(memory) == pytest.approx(sub.value(b), abs=1e-6)
        if 1e-3 < b < 1 - 1e-3:
            gradient_plane, memory_plane = sub.planes(sub.inner(sub.vertex(1.0)))
            assert gradient_plane == pytest.approx(memory_plane, abs=1e-9)
        for _ in range(20):
            assert sub.primal(memory + 0.1 * rng.normal(size=4)) > sub.primal(memory) - 1e-9
    assert interior >= 3


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
@pytest.mark.parametrize("wd", [0.0, 0.4])
@pytest.mark.parametrize("lam", [0.0, 0.5])
def test_oracle_solves_the_subproblem(kind: str, lam: float, wd: float) -> None:
    rng = np.random.default_rng(4)
    interior = 0
    for _ in range(30):
        oracle, grads = random_state(kind, rng, lam=lam, wd=wd, decoupled=True, scope="global")
        slots, eta = oracle.slots, oracle.groups[0]["lr"]
        parts = (grads, [s.d for s in slots], [s.x for s in slots])
        g, d, x = (np.concatenate([np.ravel(a) for a in part]) for part in parts)
        p = np.concatenate([oracle.metric(s, h)[1].ravel() for s, h in zip(slots, grads, strict=True)])
        delta = slots[0].prev_lr * float(g @ (d / p + wd * x))
        sub = Subproblem(g, d, x, p, eta, wd, lam, delta)
        cap = oracle.groups[0]["cap"]
        oracle.step(grads)
        interior += 0 < slots[0].raw < cap
        assert slots[0].beta == pytest.approx(sub.golden(cap), abs=1e-6)
        assert slots[0].beta == pytest.approx(sub.vertex(cap), abs=1e-9)
        np.testing.assert_allclose(np.concatenate([s.d.ravel() for s in slots]), sub.inner(slots[0].beta), atol=1e-10)
    assert interior >= 5
