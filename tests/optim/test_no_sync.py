"""No host sync in the accelerator path of step(): foreach=True must not read a tensor's value on the host."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from am_lightning.optim.closed_form import Decision
from am_lightning.optim.step_stats import BetaTally, StepStats
from tests.optim.harness import SCOPES, build, named_params

SHAPES = [(6, 4), (9,), (), (0,), (300,)]
aten = torch.ops.aten
# Operators that make the host wait for a value, or whose output shape depends on one.
READS = {
    aten._local_scalar_dense.default,
    aten.item.default,
    aten.is_nonzero.default,
    aten.equal.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.allclose.default,
}
METHODS = {
    getattr(torch.Tensor, name)
    for name in ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__", "__array__")
}


class HostReadError(AssertionError):
    pass


class RefuseDispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READS:
            raise HostReadError(str(func))
        if func in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default):
            masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
            if masks:
                raise HostReadError(f"{func} with a mask")
        return func(*args, **(kwargs or {}))


class RefuseMethods(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in METHODS:
            raise HostReadError(str(func))
        return func(*args, **(kwargs or {}))


def step_unread(optimizer: torch.optim.Optimizer) -> None:
    with RefuseMethods(), RefuseDispatch():
        optimizer.step()


def make(kind: str, scope: str, **options: Any) -> tuple[torch.optim.Optimizer, list[torch.Tensor]]:
    params = named_params(SHAPES[:3], torch.float32) + named_params(SHAPES[3:], torch.bfloat16)
    params = [(f"w{i}", p) for i, (_, p) in enumerate(params)]
    groups = [{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.1}]
    return build(kind, groups, scope=scope, foreach=True, **options), [p for _, p in params]


def give(params: list[torch.Tensor], step: int, bad: bool = False) -> None:
    gen = torch.Generator().manual_seed(step)
    for i, p in enumerate(params):
        p.grad = torch.randn(p.shape, generator=gen).to(p.dtype)
        if bad and i == 1:
            p.grad[3] = float("nan")
    if step == 2:
        params[0].grad = None


@pytest.mark.parametrize("nonfinite", ["skip", "propagate"])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("adamw", {"lr": 0.1}),
        ("adamw", {"lr": torch.tensor(0.1), "capturable": True}),
        ("adamw", {"lr": 0.0}),
        ("adamw", {"lr": 0.1, "maximize": True, "capturable": True, "weight_decay": 0.0, "lambd": 0.0}),
        ("sgd", {"lr": 0.1}),
        ("sgd", {"lr": 0.1, "weight_decay": 0.1, "decoupled_weight_decay": True}),
    ],
    ids=["adamw", "adamw-capturable", "adamw-lr0", "adamw-maximize", "sgd", "sgd-decoupled"],
)
def test_step_reads_nothing(kind: str, options: dict[str, Any], scope: str, nonfinite: str) -> None:
    optimizer, params = make(kind, scope, nonfinite=nonfinite, **options)
    for step in range(1, 4):
        give(params, step)
        step_unread(optimizer)
    give(params, 4, bad=True)
    step_unread(optimizer)
    with RefuseMethods(), RefuseDispatch():
        momentum, skipped = optimizer.momentum(), optimizer.last_step_skipped
    assert bool(skipped) == (nonfinite == "skip") and len(momentum) == len(params)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_a_bad_first_step_and_a_resume_read_nothing(kind: str, scope: str) -> None:
    optimizer, params = make(kind, scope, lr=0.1)
    give(params, 1, bad=True)
    step_unread(optimizer)
    give(params, 1)
    step_unread(optimizer)
    optimizer.load_state_dict(optimizer.state_dict())
    give(params, 3)
    step_unread(optimizer)


def test_the_exact_gap_reads_nothing() -> None:
    optimizer, params = make("sgd", "global", lr=0.1, loss_gap="exact")
    for step in range(1, 4):
        give(params, step)
        loss = torch.tensor(1.0 / step)
        with RefuseMethods(), RefuseDispatch():
            optimizer.step(lambda loss=loss: loss)


def test_what_a_bad_step_of_partitions_leaves_reads_nothing() -> None:
    """DeepSpeed's rows are a part of all tensors; the first bad one is searched for among all."""
    record, bad = StepStats(), torch.tensor([False, False, True])
    decision = Decision(torch.zeros(3), torch.ones(3), ~bad, torch.tensor(True), bad)
    positions = torch.tensor([4, 1, 7])
    with RefuseMethods(), RefuseDispatch():
        tally = BetaTally(("a", "b", "c"), torch.empty(0))
        record.observe(decision, torch.ones(3), tally, positions)
        numbers = record.numbers(torch.zeros(3))
    assert numbers[:3].tolist() == [1, 1, 7]


def test_the_guard_guards() -> None:
    flag = torch.tensor(True)
    for read in (lambda: flag.item(), lambda: bool(flag), lambda: flag.tolist(), lambda: torch.equal(flag, flag)):
        with pytest.raises(HostReadError), RefuseMethods(), RefuseDispatch():
            read()
    with pytest.raises(HostReadError), RefuseMethods(), RefuseDispatch():
        torch.ones(3)[torch.tensor([True, False, True])]
