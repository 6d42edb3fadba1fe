"""A gradient that is not finite: "skip" leaves no trace of the step, "propagate" does what AdamW does."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from am_lightning import AMAdamW
from tests.optim.harness import (
    KERNELS,
    SCOPES,
    Bowl,
    Twin,
    as_grads,
    assert_bitwise,
    assert_close,
    build,
    make_oracle,
    named_params,
    params_of,
    run_bowl,
    snapshot,
    to_numpy,
)

SHAPES = [(6, 4), (9,), (), (0,)]
BAD = {"nan": float("nan"), "inf": float("inf"), "-inf": -float("inf")}


def groups_of(params: list[Any]) -> list[dict[str, Any]]:
    return [{"params": params[:2], "weight_decay": 0.1}, {"params": params[2:], "weight_decay": 0.0}]


def give_grads(optimizer: torch.optim.Optimizer, step: int, bad: float | None = None, where: int = 0) -> None:
    gen = torch.Generator().manual_seed(100 + step)
    for i, p in enumerate(params_of(optimizer)):
        p.grad = torch.randn(p.shape, generator=gen, dtype=torch.float64).to(p.dtype)
        if bad is not None and i == where:
            p.grad.view(-1)[0] = bad


def numbers(momentum: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    return list(momentum.values())


@pytest.mark.parametrize("foreach", KERNELS)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("bad", list(BAD))
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_skip_leaves_everything_bitwise_untouched(kind: str, bad: str, scope: str, foreach: bool | None) -> None:
    """This includes tensors with good gradients, and the run continues as without the step."""
    ends = []
    for where in (0, 2, None):
        optimizer = build(kind, groups_of(named_params(SHAPES, torch.float32)), lr=0.1, scope=scope, foreach=foreach)
        for step in range(6):
            if step == 3 and where is not None:
                before, betas = snapshot(optimizer), numbers(optimizer.momentum())
                give_grads(optimizer, 77, BAD[bad], where)
                optimizer.step()
                assert bool(optimizer.last_step_skipped)
                assert_bitwise(snapshot(optimizer), before)
                assert_bitwise(numbers(optimizer.momentum()), betas)
            give_grads(optimizer, step)
            optimizer.step()
            assert not bool(optimizer.last_step_skipped)
        ends.append(snapshot(optimizer))
    assert_bitwise(ends[0], ends[2])
    assert_bitwise(ends[1], ends[2])


@pytest.mark.parametrize("foreach", KERNELS)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("bad", list(BAD))
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_skip_on_the_very_first_step(kind: str, bad: str, scope: str, foreach: bool | None) -> None:
    ends = []
    for skip in (True, False):
        optimizer = build(kind, groups_of(named_params(SHAPES, torch.float32)), lr=0.1, scope=scope, foreach=foreach)
        if skip:
            weights = [p.detach().clone() for p in params_of(optimizer)]
            for _ in range(2):
                give_grads(optimizer, 77, BAD[bad])
                optimizer.step()
                assert bool(optimizer.last_step_skipped)
                assert_bitwise([p.detach() for p in params_of(optimizer)], weights)
                assert all(torch.isnan(b) for b in numbers(optimizer.momentum()))
                assert all(float(s["step"]) == 0 for s in optimizer.state.values() if s)
        for step in range(3):
            give_grads(optimizer, step)
            optimizer.step()
        ends.append(snapshot(optimizer))
    assert_bitwise(*ends)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_skip_in_other_dtypes(kind: str, dtype: torch.dtype) -> None:
    optimizer = build(kind, named_params(SHAPES, dtype), lr=0.1)
    give_grads(optimizer, 0)
    optimizer.step()
    before = snapshot(optimizer)
    give_grads(optimizer, 1, float("inf"), 1)
    optimizer.step()
    assert bool(optimizer.last_step_skipped)
    assert_bitwise(snapshot(optimizer), before)


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_skip_in_a_tensor_longer_than_a_block(kind: str) -> None:
    """A bad element in the last block must keep the first block from being written."""
    p = torch.nn.Parameter(torch.randn(300_001, generator=torch.Generator().manual_seed(0)))
    optimizer = build(kind, [p], lr=0.1)
    give_grads(optimizer, 0)
    optimizer.step()
    before = snapshot(optimizer)
    give_grads(optimizer, 1)
    assert p.grad is not None
    p.grad[-1] = float("nan")
    optimizer.step()
    assert bool(optimizer.last_step_skipped)
    assert_bitwise(snapshot(optimizer), before)


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_skip_agrees_with_the_oracle(kind: str) -> None:
    """Scalars of a skipped step (eta_{t-1}, the beta product, t) are those of the last step that counted."""
    optimizer = build(kind, named_params(SHAPES, torch.float64), lr=0.1, weight_decay=0.05, scope="global")
    twin = Twin(optimizer, make_oracle(optimizer, scope="global"))

    def spoil(step: int, grads: list[torch.Tensor]) -> None:
        if step in (0, 4, 9):
            grads[1][3] = float("nan")

    run_bowl(twin, Bowl.around(SHAPES, seed=1), [([1.0, 0.5, 0.9, 0.3, 0.6][i % 5],) for i in range(15)], spoil)
    twin.assert_not_vacuous()


@pytest.mark.parametrize("foreach", KERNELS)
@pytest.mark.parametrize("bad", list(BAD))
@pytest.mark.parametrize("at", [0, 2])
def test_propagate_does_what_adamw_does(at: int, bad: str, foreach: bool | None) -> None:
    """Weights are nan where AdamW has nan and equal elsewhere, also in later steps (cap and lambda as in AdamW)."""
    cap = 0.1
    mine = AMAdamW(
        named_params(SHAPES, torch.float64),
        lr=0.01,
        betas=(cap, 0.99),
        lambd=0.0,
        nonfinite="propagate",
        foreach=foreach,
    )
    torchs = torch.optim.AdamW(named_params(SHAPES, torch.float64), lr=0.01, betas=(cap, 0.99))
    for step in range(5):
        for opt in (mine, torchs):
            gen = torch.Generator().manual_seed(step)
            for i, p in enumerate(params_of(opt)):
                p.grad = 1.0 + 0.03 * torch.randn(p.shape, generator=gen, dtype=torch.float64)
                if step == at and i == 0:
                    p.grad[1, 2] = BAD[bad]
            opt.step()
        assert not bool(mine.last_step_skipped)
        for p, q in zip(params_of(mine), params_of(torchs), strict=True):
            assert_close(to_numpy(p), to_numpy(q), 1e-12, f"weights after step {step}")
        assert int(torch.isnan(params_of(mine)[0]).sum()) == (step >= at)


@pytest.mark.parametrize("foreach", KERNELS)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_propagate_takes_the_cap_in_the_bad_scope_only(kind: str, scope: str, foreach: bool | None) -> None:
    groups = groups_of(named_params(SHAPES, torch.float64))
    optimizer = build(kind, groups, lr=0.1, scope=scope, nonfinite="propagate", foreach=foreach)
    twin = Twin(optimizer, make_oracle(optimizer, scope=scope, nonfinite="propagate"))
    bowl = Bowl.around(SHAPES, seed=2)
    rates = [1.0, 0.5, 0.9, 0.3, 0.6, 0.8]
    for step, lr in enumerate(rates):
        twin.set_lr(lr, 0.7 * lr)
        grads = as_grads(bowl.grads([s.x for s in twin.oracle.slots]), twin.params)
        if step == 3:
            grads[0][2, 1] = float("nan")
        twin.step(grads)
    betas = numbers(optimizer.momentum())
    cap = 0.89 if kind == "adamw" else 0.9
    touched = {"tensor": [0], "group": [0, 1], "global": [0, 1, 2, 3]}[scope]
    assert all(float(betas[i]) == pytest.approx(cap, abs=1e-12) for i in touched)
    assert [int(torch.isnan(p).sum()) for p in twin.params] == [1, 0, 0, 0]


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_last_step_skipped_is_a_plain_flag_from_the_start(kind: str) -> None:
    optimizer = build(kind, named_params(SHAPES, torch.float32))
    flag = optimizer.last_step_skipped
    assert flag.dtype == torch.bool and flag.dim() == 0 and not bool(flag)


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_skipped_steps_are_counted_in_all_and_in_a_row(kind: str) -> None:
    """The count of consecutive steps ends with a good one."""
    optimizer = build(kind, groups_of(named_params(SHAPES, torch.float32)), lr=0.1)
    found = []
    for step, bad in enumerate([None, 0, 0, None, 2, None, None]):
        give_grads(optimizer, step, None if bad is None else float("nan"), bad or 0)
        optimizer.step()
        found.append(optimizer.report()[-4:-1].tolist())
    assert found == [[0, 0, 0], [1, 1, 0], [2, 2, 0], [2, 0, 0], [3, 1, 2], [3, 0, 2], [3, 0, 2]]
