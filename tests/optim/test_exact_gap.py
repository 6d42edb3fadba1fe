"""AMSGD(loss_gap="exact"): full-batch training, where the closure's loss gives the gap between the planes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from am_lightning import AMSGD
from tests.optim.harness import KERNELS, Twin, assert_bitwise, make_oracle, named_params, snapshot

SHAPES = [(4, 3), (5,), ()]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "lambda0": {"lambd": 0.0, "beta_max": 1.0},
    "coupled": {"weight_decay": 0.1},
    "decoupled": {"weight_decay": 0.03, "decoupled_weight_decay": True},
    "maximize": {"maximize": True},
    "maximize coupled": {"maximize": True, "weight_decay": 0.1},
}


class Quadratic:
    """f = 1/2 sum h (x - c)^2, or its negative; deterministic."""

    def __init__(self, params: list[torch.Tensor], sign: float) -> None:
        gen = torch.Generator().manual_seed(5)
        self.params, self.sign = params, sign
        self.h = [torch.rand(p.shape, generator=gen, dtype=torch.float64) + 0.2 for p in params]
        self.c = [torch.randn(p.shape, generator=gen, dtype=torch.float64) for p in params]

    def __call__(self) -> torch.Tensor:
        for p in self.params:
            p.grad = None
        terms = [(0.5 * h * (p - c) ** 2).sum() for p, h, c in zip(self.params, self.h, self.c, strict=True)]
        loss = self.sign * torch.stack(terms).sum()
        loss.backward()
        return loss


class Logistic:
    """Mean log loss of a linear classifier on fixed data; the parameters are its weights."""

    def __init__(self, params: list[torch.Tensor], sign: float) -> None:
        gen = torch.Generator().manual_seed(6)
        self.params, self.sign = params, sign
        n = sum(p.numel() for p in params)
        self.features = 3.0 * torch.randn(40, n, generator=gen, dtype=torch.float64)
        self.labels = torch.randint(0, 2, (40,), generator=gen).double() * 2 - 1

    def __call__(self) -> torch.Tensor:
        for p in self.params:
            p.grad = None
        weights = torch.cat([p.reshape(-1) for p in self.params])
        loss = self.sign * torch.nn.functional.softplus(-self.labels * (self.features @ weights)).mean()
        loss.backward()
        return loss


def run(optimizer: AMSGD, problem: Any, rates: list[float], pause: bool = False) -> Twin:
    twin = Twin(optimizer, make_oracle(optimizer, scope="global", exact=True))
    for i, lr in enumerate(rates):
        twin.set_lr(*([lr] * len(optimizer.param_groups)))
        loss = problem()
        grads = [p.grad for p in twin.params]
        if pause and i in (4, 5):
            grads[1] = None
        twin.step(grads, loss.detach())
    return twin


@pytest.mark.parametrize("foreach", KERNELS)
@pytest.mark.parametrize("problem", [Quadratic, Logistic])
@pytest.mark.parametrize("options", list(OPTIONS))
def test_every_step_equals_the_oracle(options: str, problem: Any, foreach: bool | None) -> None:
    params = named_params(SHAPES, torch.float64)
    optimizer = AMSGD(params, lr=1.0, loss_gap="exact", foreach=foreach, **OPTIONS[options])
    sign = -1.0 if OPTIONS[options].get("maximize") else 1.0
    rates = [1.6, 1.0, 1.9, 0.7, 1.3, 0.0, 1.5, 1.1] * 2
    if problem is Logistic:
        rates = [0.8 * r for r in rates]
    run(optimizer, problem([p for _, p in params], sign), rates, pause=True).assert_not_vacuous(share=0.2)


def test_float32_equals_the_oracle() -> None:
    params = named_params(SHAPES, torch.float32)
    optimizer = AMSGD(params, lr=1.0, loss_gap="exact", weight_decay=0.05)
    twin = run(optimizer, Quadratic([p for _, p in params], 1.0), [1.6, 1.0, 1.9, 0.7, 1.3] * 2)
    twin.assert_not_vacuous()


def test_exact_and_first_order_differ() -> None:
    """The exact gap of a curved loss differs from its first-order estimate, so ignoring the loss is detected."""
    betas = []
    for gap in ("exact", "first_order"):
        params = named_params(SHAPES, torch.float64)
        optimizer = AMSGD(params, lr=1.2, loss_gap=gap, lambd=0.0)
        problem = Quadratic([p for _, p in params], 1.0)
        for _ in range(3):
            optimizer.step(problem)
        betas.append(float(optimizer.momentum()["w0"]))
    assert abs(betas[0] - betas[1]) > 1e-3


def test_a_float_loss_is_accepted() -> None:
    results = []
    for convert in (lambda loss: loss, float, lambda loss: loss.detach()):
        params = named_params(SHAPES, torch.float64)
        optimizer = AMSGD(params, lr=1.2, loss_gap="exact")
        problem = Quadratic([p for _, p in params], 1.0)
        for _ in range(4):
            optimizer.step(lambda convert=convert, problem=problem: convert(problem().detach()))
        results.append(snapshot(optimizer))
    assert_bitwise(results[0], results[1])
    assert_bitwise(results[0], results[2])


@pytest.mark.parametrize("scope", ["tensor", "group"])
def test_exact_needs_scope_global(scope: str) -> None:
    with pytest.raises(ValueError, match=r"global"):
        AMSGD(named_params(SHAPES, torch.float64), loss_gap="exact", scope=scope)


def test_unknown_loss_gap() -> None:
    with pytest.raises(ValueError, match=r"loss_gap.*second_order|second_order.*loss_gap"):
        AMSGD(named_params(SHAPES, torch.float64), loss_gap="second_order")


BAD_LOSSES = {
    "none": lambda loss: None,
    "vector": lambda loss: torch.stack([loss, loss]),
    "empty": lambda loss: torch.zeros(0),
    "complex": lambda loss: torch.complex(loss.detach(), loss.detach()),
    "python complex": lambda loss: complex(1.0, 2.0),
    "bool": lambda loss: True,
    "bool tensor": lambda loss: torch.tensor(True),
    "string": lambda loss: "0.5",
    "tuple": lambda loss: (loss,),
}


@pytest.mark.parametrize("steps_before", [0, 2])
@pytest.mark.parametrize("bad", list(BAD_LOSSES))
def test_a_closure_without_a_real_scalar_moves_nothing(bad: str, steps_before: int) -> None:
    params = named_params(SHAPES, torch.float64)
    optimizer = AMSGD(params, lr=1.2, loss_gap="exact")
    problem = Quadratic([p for _, p in params], 1.0)
    for _ in range(steps_before):
        optimizer.step(problem)
    before, twin = snapshot(optimizer), copy.deepcopy((params, optimizer))
    with pytest.raises((ValueError, TypeError), match=r"closure|loss"):
        optimizer.step(lambda: BAD_LOSSES[bad](problem()))
    assert_bitwise(snapshot(optimizer), before)
    optimizer.step(problem)  # the next good step is as without the bad one
    twin[1].step(Quadratic([p for _, p in twin[0]], 1.0))
    assert_bitwise(snapshot(optimizer), snapshot(twin[1]))


def test_step_without_closure_moves_nothing() -> None:
    params = named_params(SHAPES, torch.float64)
    optimizer = AMSGD(params, lr=1.2, loss_gap="exact")
    for _, p in params:
        p.grad = torch.ones_like(p)
    before = snapshot(optimizer)
    with pytest.raises((ValueError, TypeError, RuntimeError), match="closure"):
        optimizer.step()
    assert_bitwise(snapshot(optimizer), before)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("first", [True, False])
def test_a_loss_that_is_not_finite_is_a_skipped_step(first: bool, value: float) -> None:
    """The previous loss is kept, too: the next step measures its gap from the last active step."""
    runs = []
    for bad_step in (0 if first else 2, None):
        params = named_params(SHAPES, torch.float64)
        optimizer = AMSGD(params, lr=1.2, loss_gap="exact", weight_decay=0.05)
        problem = Quadratic([p for _, p in params], 1.0)
        for i in range(5):
            if i == bad_step:
                before = snapshot(optimizer)
                optimizer.step(lambda problem=problem: problem().detach() * 0 + value)
                assert bool(optimizer.last_step_skipped)
                if not first:
                    assert_bitwise(snapshot(optimizer), before)
            optimizer.step(problem)
            assert not bool(optimizer.last_step_skipped)
        runs.append(snapshot(optimizer))
    assert_bitwise(*runs)


def test_the_previous_loss_survives_a_checkpoint() -> None:
    ends = []
    for reload in (False, True):
        params = named_params(SHAPES, torch.float64)
        optimizer = AMSGD(params, lr=1.2, loss_gap="exact", weight_decay=0.05)
        problem = Quadratic([p for _, p in params], 1.0)
        for _ in range(3):
            optimizer.step(problem)
        if reload:
            saved = copy.deepcopy(optimizer.state_dict())
            optimizer = AMSGD(params, lr=1.2, loss_gap="exact", weight_decay=0.05)
            optimizer.load_state_dict(saved)
        for _ in range(3):
            optimizer.step(problem)
        ends.append(snapshot(optimizer))
    assert_bitwise(*ends)


def test_two_learning_rates_are_refused() -> None:
    """Delta / eta is defined only if the whole model moves with one eta."""
    params = named_params(SHAPES, torch.float64)
    optimizer = AMSGD([{"params": params[:1], "lr": 0.1}, {"params": params[1:], "lr": 0.2}], loss_gap="exact")
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="lr"):
        optimizer.step(Quadratic([p for _, p in params], 1.0))
    assert_bitwise(snapshot(optimizer), before)


def test_groups_with_one_lr_and_their_own_coupled_decay() -> None:
    params = named_params(SHAPES, torch.float64)
    groups = [{"params": params[:1], "weight_decay": 0.1}, {"params": params[1:], "weight_decay": 0.0}]
    optimizer = AMSGD(groups, lr=1.0, loss_gap="exact")
    run(optimizer, Quadratic([p for _, p in params], 1.0), [1.6, 1.0, 1.9, 0.7, 1.3] * 3).assert_not_vacuous()
