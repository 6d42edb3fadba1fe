"""torch.optim's guarantees about `step`: the right direction, equal implementations, schedulers, odd parameters."""

from __future__ import annotations

import functools
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from tests.generic.optimizers import (
    OPTIMIZERS,
    SCHEDULERS,
    STATE_NAMES,
    LeastSquares,
    OptimizerInfo,
    each_case,
    each_optimizer,
    rosenbrock,
    with_own_lr,
)

# beta_t is float64, from sums in float32 at least; bfloat16 moments may round either way
BETA_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}

each_foreach = pytest.mark.parametrize("foreach", [False, True], ids=["forloop", "foreach"])


def _skip_tensor_lr(kwargs: dict[str, Any], foreach: bool) -> None:
    if foreach and isinstance(kwargs.get("lr"), Tensor) and not kwargs.get("capturable"):
        pytest.skip("torch.optim refuses this pair, and so do these classes: see test_errors.py")


def _minimize(
    problem: LeastSquares, optimizer: Optimizer, schedulers: list[LRScheduler], steps: int
) -> tuple[float, float]:
    first = problem.loss().item()
    for _ in range(steps):
        loss = optimizer.step(problem.loss)
        for scheduler in schedulers:
            if isinstance(scheduler, ReduceLROnPlateau):
                scheduler.step(loss.detach())
            else:
                scheduler.step()
    return first, problem.loss().item()


@each_foreach
@each_case
@pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous", "strided"])
def test_goes_in_the_right_direction(
    info: OptimizerInfo, kwargs: dict[str, Any], foreach: bool, contiguous: bool
) -> None:
    _skip_tensor_lr(kwargs, foreach)
    problem = LeastSquares(contiguous=contiguous)
    optimizer = info.optim_cls(problem.params, foreach=foreach, **with_own_lr(kwargs))
    first, last = _minimize(problem, optimizer, [], steps=20)
    assert last > first if kwargs.get("maximize") else last < first


@each_foreach
@each_optimizer
@pytest.mark.parametrize("schedulers", SCHEDULERS, ids=["step", "plateau", "cosine", "linear+plateau", "four"])
@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float", "tensor"])
def test_schedulers_go_in_the_right_direction(
    info: OptimizerInfo, foreach: bool, schedulers: list[Callable[[Optimizer], LRScheduler]], tensor_lr: bool
) -> None:
    problem = LeastSquares()
    kwargs: dict[str, Any] = {"lr": torch.tensor(1e-3) if tensor_lr else 1e-3}
    _skip_tensor_lr(kwargs, foreach)
    optimizer = info.optim_cls(problem.params, foreach=foreach, **kwargs)
    rates: set[float] = set()
    optimizer.register_step_pre_hook(lambda opt, *_: rates.add(float(opt.param_groups[0]["lr"])))
    first, last = _minimize(problem, optimizer, [make(optimizer) for make in schedulers], steps=60)
    assert last < first
    # The plateau scheduler alone changes nothing on this problem.
    assert len(rates) == 1 if schedulers is SCHEDULERS[1] else len(rates) > 1


@each_foreach
@each_optimizer
@pytest.mark.parametrize("schedulers", SCHEDULERS, ids=["step", "plateau", "cosine", "linear+plateau", "four"])
def test_param_group_with_scheduler_goes_in_the_right_direction(
    info: OptimizerInfo, foreach: bool, schedulers: list[Callable[[Optimizer], LRScheduler]]
) -> None:
    problem = LeastSquares()
    groups = [{"params": [problem.weight]}, {"params": [problem.bias], "lr": 1e-2}]
    optimizer = info.optim_cls(groups, lr=1e-3, foreach=foreach)
    first, last = _minimize(problem, optimizer, [make(optimizer) for make in schedulers], steps=60)
    assert last < first


def _mixed_params(dtype: torch.dtype) -> list[Parameter]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(7, 3), (4,), (), (0,), (2, 3, 4), (300, 5), (1,)]
    params = [Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in shapes]
    params.append(Parameter(torch.randn(6, 8, generator=generator, dtype=torch.float64).to(dtype).t()))
    return params


@each_case
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("implementation", ["foreach", "fused"])
def test_implementations_match_forloop(
    info: OptimizerInfo, kwargs: dict[str, Any], implementation: str, dtype: torch.dtype
) -> None:
    """Weights, states and betas agree after every step, for parameters of all sizes, which come and go."""
    if implementation not in info.supported_impls:
        pytest.skip(f"there is no {implementation}")
    _skip_tensor_lr(kwargs, foreach=implementation == "foreach")
    pair = []
    for options in ({"foreach": False}, {implementation: True}):
        params = _mixed_params(dtype)
        pair.append((params, info.optim_cls(params, **options, **with_own_lr(kwargs))))
    generator = torch.Generator().manual_seed(2)
    for step in range(6):
        grads = [torch.randn(p.shape, generator=generator, dtype=torch.float64).to(dtype) for p in pair[0][0]]
        for params, optimizer in pair:
            for index, (param, grad) in enumerate(zip(params, grads, strict=True)):
                param.grad = None if (step + index) % 4 == 3 else grad.clone()
            optimizer.step(lambda step=step: torch.tensor(1.0 / (1 + step), dtype=torch.float64))
        (ours, loop), (theirs, multi) = pair
        torch.testing.assert_close(theirs, ours)
        close = {"rtol": BETA_TOLERANCE[dtype], "atol": BETA_TOLERANCE[dtype]}
        torch.testing.assert_close(multi.momentum(), loop.momentum(), equal_nan=True, **close)
        for state, expected in zip(multi.state.values(), loop.state.values(), strict=True):
            assert list(state) == list(expected)
            for name in state:
                torch.testing.assert_close(state[name], expected[name], **(close if state[name].ndim == 0 else {}))


@each_foreach
@each_optimizer
def test_mixed_dtypes_in_one_optimizer(info: OptimizerInfo, foreach: bool) -> None:
    """Every dtype is kept, each parameter decreases, and 16-bit ones follow the float64 one."""
    dtypes = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
    params = [Parameter(torch.full((9,), 1.0, dtype=dtype)) for dtype in dtypes]
    optimizer = info.optim_cls(params, lr=1e-2, foreach=foreach, scope="tensor")
    for _ in range(10):
        for param in params:
            param.grad = param.detach().clone()
        optimizer.step()
    for param, dtype in zip(params, dtypes, strict=True):
        assert param.dtype == dtype
        assert all(optimizer.state[param][name].dtype == dtype for name in STATE_NAMES[info.optim_cls])
        torch.testing.assert_close(param.double(), params[0].double(), rtol=3e-2, atol=0)
        assert (param < 1).all()


@each_foreach
@each_optimizer
def test_default_dtype_does_not_matter(info: OptimizerInfo, foreach: bool) -> None:
    results = []
    old = torch.get_default_dtype()
    for default in (torch.float32, torch.float64):
        torch.set_default_dtype(default)
        try:
            problem = LeastSquares(dtype=torch.float32)
            optimizer = info.optim_cls(problem.params, foreach=foreach)
            _minimize(problem, optimizer, [], steps=5)
        finally:
            torch.set_default_dtype(old)
        results.append([param.detach() for param in problem.params])
    torch.testing.assert_close(results[0], results[1])


@each_foreach
@each_optimizer
def test_tensor_lr_matches_float_lr(info: OptimizerInfo, foreach: bool) -> None:
    """The group keeps the user's own tensor, which a scheduler may change in place."""
    if foreach and not info.has_capturable_arg:
        pytest.skip("a tensor lr needs capturable where foreach is on")
    extra = {"capturable": True} if foreach else {}
    problems = [LeastSquares(), LeastSquares(), LeastSquares()]
    tensor = torch.tensor(0.01)
    rates = [0.01, tensor, torch.tensor([0.01])]
    optimizers = [
        info.optim_cls(problem.params, lr=lr, foreach=foreach, **extra)
        for problem, lr in zip(problems, rates, strict=True)
    ]
    assert optimizers[1].param_groups[0]["lr"] is tensor
    for step in range(10):
        for problem, optimizer in zip(problems, optimizers, strict=True):
            problem.loss()
            optimizer.step()
        for optimizer in optimizers:
            lr = optimizer.param_groups[0]["lr"]
            if isinstance(lr, Tensor):
                lr.fill_(0.01 / (step + 2))
            else:
                optimizer.param_groups[0]["lr"] = 0.01 / (step + 2)
        torch.testing.assert_close(problems[1].params, problems[0].params)
        torch.testing.assert_close(problems[2].params, problems[0].params)


@each_optimizer
def test_param_groups_lr(info: OptimizerInfo) -> None:
    """A group's own lr is used: 0 keeps its parameters fixed while the other group moves."""
    problem = LeastSquares()
    still = problem.bias.detach().clone()
    moving = problem.weight.detach().clone()
    optimizer = info.optim_cls([{"params": [problem.weight]}, {"params": [problem.bias], "lr": 0.0}], lr=1e-2)
    for _ in range(10):
        optimizer.step(problem.loss)
    assert torch.equal(problem.bias, still)
    assert not torch.equal(problem.weight, moving)
    assert all(torch.isfinite(value).all() for state in optimizer.state.values() for value in state.values())


@each_optimizer
def test_param_groups_weight_decay(info: OptimizerInfo) -> None:
    """Decay shrinks its own group and leaves the other as it would be without decay."""

    def run(decay: float) -> LeastSquares:
        problem = LeastSquares()
        groups = [{"params": [problem.weight], "weight_decay": decay}, {"params": [problem.bias], "weight_decay": 0.0}]
        optimizer = info.optim_cls(groups, lr=1e-3, scope="tensor")
        for _ in range(3):
            problem.weight.grad = torch.full_like(problem.weight, 1e-2)
            problem.bias.grad = torch.full_like(problem.bias, 1e-2)
            optimizer.step()
        return problem

    plain, decayed = run(0.0), run(10.0)
    assert decayed.weight.norm() < plain.weight.norm()
    torch.testing.assert_close(decayed.bias, plain.bias, rtol=0, atol=0)


@each_foreach
@each_case
def test_step_without_gradients_is_a_noop(info: OptimizerInfo, kwargs: dict[str, Any], foreach: bool) -> None:
    _skip_tensor_lr(kwargs, foreach)
    problem = LeastSquares()
    before = [param.detach().clone() for param in problem.params]
    optimizer = info.optim_cls(problem.params, foreach=foreach, **with_own_lr(kwargs))
    optimizer.step(lambda: torch.tensor(1.0))
    torch.testing.assert_close([param.detach() for param in problem.params], before, rtol=0, atol=0)
    assert all(len(state) == 0 for state in optimizer.state.values())
    assert not optimizer.last_step_skipped


@each_foreach
@each_case
def test_parameter_without_gradient_keeps_its_state(info: OptimizerInfo, kwargs: dict[str, Any], foreach: bool) -> None:
    """The parameter is left out of one step, bitwise unchanged, while the other one moves."""
    _skip_tensor_lr(kwargs, foreach)
    problem = LeastSquares()
    optimizer = info.optim_cls(problem.params, foreach=foreach, **with_own_lr(kwargs))
    for _ in range(3):
        optimizer.step(problem.loss)
    kept = deepcopy({"bias": problem.bias.detach(), **optimizer.state[problem.bias]})
    moved = problem.weight.detach().clone()

    def closure() -> Tensor:
        loss = problem.loss()
        problem.bias.grad = None
        return loss

    optimizer.step(closure)
    now = {"bias": problem.bias.detach(), **optimizer.state[problem.bias]}
    torch.testing.assert_close(now, kept, rtol=0, atol=0)
    assert not torch.equal(problem.weight, moved)


@each_foreach
@each_case
def test_zero_gradients_move_only_by_decay(info: OptimizerInfo, kwargs: dict[str, Any], foreach: bool) -> None:
    _skip_tensor_lr(kwargs, foreach)
    problem = LeastSquares()
    before = [param.detach().clone() for param in problem.params]
    optimizer = info.optim_cls(problem.params, foreach=foreach, **with_own_lr(kwargs))
    for _ in range(3):
        for param in problem.params:
            param.grad = torch.zeros_like(param)
        optimizer.step(lambda: torch.tensor(1.0))
    assert all(torch.isfinite(param).all() for param in problem.params)
    if optimizer.param_groups[0]["weight_decay"] == 0:
        torch.testing.assert_close([param.detach() for param in problem.params], before, rtol=0, atol=0)
    else:
        assert all(not torch.equal(param, old) for param, old in zip(problem.params, before, strict=True))


@each_optimizer
def test_gradients_are_not_changed(info: OptimizerInfo) -> None:
    for kwargs in ({}, {"weight_decay": 0.1}, {"maximize": True}, {"foreach": True}):
        problem = LeastSquares()
        optimizer = info.optim_cls(problem.params, **kwargs)
        for _ in range(3):
            problem.loss()
            before = [param.grad.clone() for param in problem.params]
            optimizer.step()
            torch.testing.assert_close([param.grad for param in problem.params], before, rtol=0, atol=0)


@each_case
def test_closure_is_called_once_with_gradients_enabled(info: OptimizerInfo, kwargs: dict[str, Any]) -> None:
    problem = LeastSquares()
    optimizer = info.optim_cls(problem.params, **with_own_lr(kwargs))
    calls = []

    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        return problem.loss()

    with torch.no_grad():
        loss = optimizer.step(closure)
    assert calls == [True]
    assert isinstance(loss, Tensor)
    assert loss.ndim == 0


@each_optimizer
def test_step_without_closure_returns_none(info: OptimizerInfo) -> None:
    problem = LeastSquares()
    problem.loss()
    assert info.optim_cls(problem.params).step() is None


@each_foreach
@pytest.mark.parametrize(
    ("info", "kwargs"),
    [
        (OPTIMIZERS[0], {"lr": 5e-2, "weight_decay": 0.0}),
        (OPTIMIZERS[0], {"lr": 5e-2, "weight_decay": 0.0, "scope": "global"}),
        (OPTIMIZERS[1], {"lr": 1e-3, "lambd": 0.0}),
        (OPTIMIZERS[1], {"lr": 1e-3, "lambd": 0.0, "loss_gap": "exact"}),
    ],
    ids=["adamw", "adamw-global", "sgd", "sgd-exact"],
)
def test_rosenbrock(info: OptimizerInfo, kwargs: dict[str, Any], foreach: bool) -> None:
    """In the curved valley the distance to the minimum at (1, 1) falls by a third, the value by nine tenths."""
    solution = torch.tensor([1.0, 1.0], dtype=torch.float64)
    start = torch.tensor([1.5, 1.5], dtype=torch.float64)

    def run(steps: int, **extra: Any) -> Tensor:
        point = Parameter(start.clone())
        optimizer = info.optim_cls([point], foreach=foreach, **{**kwargs, **extra})

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = rosenbrock(point)
            loss.backward()
            return loss

        for _ in range(steps):
            optimizer.step(closure)
        return point.detach()

    end = run(1000)
    assert end.dist(solution) < start.dist(solution) * 2 / 3
    assert rosenbrock(end) < 0.1 * rosenbrock(start)
    assert rosenbrock(run(10, maximize=True, lr=1e-5)) > rosenbrock(start)


@each_foreach
@each_optimizer
def test_big_and_small_tensors_agree_with_the_pieces(info: OptimizerInfo, foreach: bool) -> None:
    """A tensor longer than one cache block takes the same step as the same numbers split into a matrix."""
    numbers = torch.randn(600_000, generator=torch.Generator().manual_seed(3))
    flat, matrix = Parameter(numbers.clone()), Parameter(numbers.view(600, 1000).clone())
    optimizer = info.optim_cls([flat, matrix], lr=1e-2, foreach=foreach, scope="tensor")
    for step in range(3):
        grad = torch.randn(600_000, generator=torch.Generator().manual_seed(10 + step))
        flat.grad, matrix.grad = grad, grad.view(600, 1000)
        optimizer.step()
    torch.testing.assert_close(flat, matrix.view(-1))
    betas = list(optimizer.momentum().values())
    torch.testing.assert_close(betas[0], betas[1])


@each_foreach
@each_optimizer
def test_only_empty_parameters(info: OptimizerInfo, foreach: bool) -> None:
    empty = Parameter(torch.empty(0, 3))
    optimizer = info.optim_cls([empty], foreach=foreach)
    for _ in range(2):
        empty.grad = torch.empty(0, 3)
        optimizer.step()
    assert empty.shape == (0, 3)
    assert not optimizer.last_step_skipped


@each_optimizer
def test_parameters_that_need_no_gradient_are_left_alone(info: OptimizerInfo) -> None:
    problem = LeastSquares()
    frozen = Parameter(torch.ones(3), requires_grad=False)
    optimizer = info.optim_cls([*problem.params, frozen])
    for _ in range(3):
        optimizer.step(problem.loss)
    assert torch.equal(frozen, torch.ones(3))
    assert frozen not in optimizer.state or not optimizer.state[frozen]


@each_optimizer
def test_two_optimizers_do_not_share_anything(info: OptimizerInfo) -> None:
    problem, alone = LeastSquares(), LeastSquares()
    first = info.optim_cls([problem.weight], scope="tensor")
    second = info.optim_cls([problem.bias], scope="tensor")
    both = info.optim_cls(alone.params, scope="tensor")
    for _ in range(4):
        problem.loss()
        first.step()
        second.step()
        alone.loss()
        both.step()
    torch.testing.assert_close(problem.params, alone.params, rtol=0, atol=0)


@each_optimizer
def test_added_group_takes_part(info: OptimizerInfo) -> None:
    problem = LeastSquares()
    optimizer = info.optim_cls([("weight", problem.weight)])
    optimizer.step(problem.loss)
    optimizer.add_param_group({"params": [("bias", problem.bias)], "lr": 5e-3})
    before = problem.bias.detach().clone()
    optimizer.step(problem.loss)
    assert not torch.equal(problem.bias, before)
    assert set(optimizer.momentum()) == {"weight", "bias"}
    expected = set(optimizer.param_groups[0]) - {"params", "param_names"}
    assert expected <= set(optimizer.param_groups[1])


@each_optimizer
def test_a_copied_optimizer_steps_like_the_original(info: OptimizerInfo) -> None:
    problem = LeastSquares()
    optimizer = info.optim_cls(problem.params)
    for _ in range(3):
        optimizer.step(problem.loss)
    copied_problem, copied = deepcopy((problem, optimizer))
    for _ in range(3):
        optimizer.step(problem.loss)
        copied.step(functools.partial(copied_problem.loss))
    torch.testing.assert_close(copied_problem.params, problem.params, rtol=0, atol=0)
    assert copied_problem.weight is not problem.weight
