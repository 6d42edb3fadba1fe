"""The plan of kernels is kept from step to step and rebuilt when its inputs change."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from am_lightning import AMSGD, AMAdamW
from am_lightning.optim import base
from am_lightning.optim.kernels.plan import KernelPlan
from tests.optim.harness import assert_close, params_of, to_numpy

SHAPES = [(6, 5), (7,), (3, 4, 2, 2)]
OPTIONS: dict[str, dict[str, Any]] = {"chunked": {}, "foreach": {"foreach": True}, "cpp": {"fused": True}}


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record one entry per plan that is built."""
    count: list[int] = []

    def counted(*arguments: Any, **options: Any) -> KernelPlan:
        count.append(1)
        return KernelPlan(*arguments, **options)

    monkeypatch.setattr(base, "KernelPlan", counted)
    return count


def make(kind: type[Any] = AMAdamW, **options: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    return kind([{"params": params[:2]}, {"params": params[2:]}], lr=0.05, weight_decay=0.1, **options)


def go(optimizer: Any, steps: range, without: int | None = None) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for i, p in enumerate(params_of(optimizer)):
            grad = torch.randn(p.shape, generator=generator).to(p.dtype)
            p.grad = None if i == without else torch.empty_like(p).copy_(grad)
        optimizer.step()


def other_strides(optimizer: Any) -> None:
    p = params_of(optimizer)[2]
    p.data = p.data.to(memory_format=torch.channels_last)
    state = optimizer.state[p]
    for name in ("exp_avg", "exp_avg_sq"):
        state[name] = state[name].to(memory_format=torch.channels_last)


def strides_of_the_parameter_alone(optimizer: Any) -> None:
    p = params_of(optimizer)[0]
    p.data = p.data.t().contiguous().t()


def low_precision_state(optimizer: Any) -> None:
    state = optimizer.state[params_of(optimizer)[0]]
    state["exp_avg"] = state["exp_avg"].double()


def state_replaced(optimizer: Any) -> None:
    for state in optimizer.state.values():
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = state[name].clone()


def decay(optimizer: Any) -> None:
    optimizer.param_groups[1]["weight_decay"] = 0.0


def ascent(optimizer: Any) -> None:
    optimizer.param_groups[0]["maximize"] = True


def other_kernel(optimizer: Any) -> None:
    optimizer.param_groups[1] |= {"foreach": False, "fused": False}


# A change, and whether it needs another plan: new tensors of the same kind do not.
CHANGES: dict[str, tuple[Callable[[Any], None], bool]] = {
    "strides": (other_strides, True),
    "strides of the parameter alone": (strides_of_the_parameter_alone, True),
    "dtype of a state": (low_precision_state, True),
    "state replaced": (state_replaced, False),
    "decay": (decay, True),
    "maximize": (ascent, True),
    "kernel": (other_kernel, True),
}


@pytest.mark.parametrize("kernel", list(OPTIONS))
def test_five_steps_take_one_plan(made: list[int], kernel: str) -> None:
    optimizer = make(**OPTIONS[kernel])
    for step in range(5):
        for group in optimizer.param_groups:
            group["lr"] = 0.05 / (1 + step)
        go(optimizer, range(step, step + 1))
    assert len(made) == 1


@pytest.mark.parametrize("change", list(CHANGES))
@pytest.mark.parametrize("kernel", list(OPTIONS))
def test_what_changes_is_followed(made: list[int], kernel: str, change: str) -> None:
    """Compare with single_tensor, which builds a plan for each step."""
    edit, replanned = CHANGES[change]
    ours, plain = make(**OPTIONS[kernel]), make(foreach=False)
    go(ours, range(3))
    edit(ours)
    go(ours, range(3, 6))
    assert len(made) == 1 + replanned
    for step in range(6):
        if step == 3:
            edit(plain)
        plain._plans = {}
        go(plain, range(step, step + 1))
    same(ours, plain)


@pytest.mark.parametrize("kernel", list(OPTIONS))
def test_a_gradient_that_is_missing_for_a_step(made: list[int], kernel: str) -> None:
    ours, plain = make(**OPTIONS[kernel]), make(foreach=False)
    for optimizer in (ours, plain):
        go(optimizer, range(2))
        go(optimizer, range(2, 3), without=1)
        go(optimizer, range(3, 5))
        assert params_of(optimizer)[1].grad is not None
    assert len(made) == 2 * 3
    same(ours, plain)


def same(ours: Any, plain: Any) -> None:
    for p, q in zip(params_of(ours), params_of(plain), strict=True):
        assert_close(to_numpy(p), to_numpy(q), 2e-6, "weights")
        for key, value in ours.state[p].items():
            assert_close(to_numpy(value), to_numpy(plain.state[q][key]), 2e-6, key)


@pytest.mark.parametrize("kernel", [*OPTIONS, "single_tensor"])
@pytest.mark.parametrize("kind", [AMAdamW, AMSGD])
def test_gradients_are_not_kept_alive_between_steps(kind: type[Any], kernel: str) -> None:
    """A kept plan holds no tensors of its step, so zero_grad() frees the gradients' memory."""
    if kind is AMSGD and kernel == "cpp":
        pytest.skip("AMSGD has no fused kernel")
    optimizer = make(kind, **OPTIONS.get(kernel, {"foreach": False}))
    go(optimizer, range(2))
    watched = [weakref.ref(p.grad) for p in params_of(optimizer)]
    storages = [p.grad.untyped_storage()._weak_ref() for p in params_of(optimizer)]
    optimizer.zero_grad()
    gc.collect()
    assert all(each() is None for each in watched)
    assert all(torch.UntypedStorage._expired(each) for each in storages)
