"""Refusals that the constructors share with torch.optim's own optimizers, in torch.optim's words."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import Parameter

from am_lightning import AMAdamW
from tests.generic.optimizers import ErrorOptimizerInput, LeastSquares, OptimizerInfo, each_error, each_optimizer


@each_error
def test_error_inputs(info: OptimizerInfo, error: ErrorOptimizerInput) -> None:
    entry = error.optimizer_error_input
    params = LeastSquares().params if entry.params is None else entry.params
    if issubclass(error.error_type, Warning):
        with pytest.warns(error.error_type, match=error.error_regex):
            info.optim_cls(params, **entry.kwargs)
    else:
        with pytest.raises(error.error_type, match=error.error_regex):
            info.optim_cls(params, **entry.kwargs)


@each_optimizer
def test_an_empty_parameter_list(info: OptimizerInfo) -> None:
    with pytest.raises(ValueError, match="empty parameter list"):
        info.optim_cls([])


@each_optimizer
def test_non_leaf_parameter(info: OptimizerInfo) -> None:
    with pytest.raises(ValueError, match="non-leaf"):
        info.optim_cls([Parameter(torch.ones(2)) * 2])


@each_optimizer
def test_non_tensor_parameter(info: OptimizerInfo) -> None:
    with pytest.raises(TypeError, match="optimizer can only optimize Tensors"):
        info.optim_cls([1.0])


def _snapshot(problem: LeastSquares, optimizer: Any) -> tuple[list[torch.Tensor], int]:
    return [param.detach().clone() for param in problem.params], sum(len(state) for state in optimizer.state.values())


@each_optimizer
@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("kind", ["sparse", "complex"])
def test_unsupported_gradients_are_refused_before_anything_moves(info: OptimizerInfo, foreach: bool, kind: str) -> None:
    problem = LeastSquares()
    problem.loss()
    last = Parameter(torch.ones(3, dtype=torch.complex64 if kind == "complex" else torch.float32))
    last.grad = torch.ones_like(last)
    if kind == "sparse":
        last.grad = last.grad.to_sparse()
    with pytest.raises((RuntimeError, ValueError, TypeError), match=kind):
        optimizer = info.optim_cls([*problem.params, last], foreach=foreach)
        before = _snapshot(problem, optimizer)
        try:
            optimizer.step()
        finally:
            after = _snapshot(problem, optimizer)
            torch.testing.assert_close(after[0], before[0], rtol=0, atol=0)
            assert after[1] == before[1]


@each_optimizer
def test_state_of_another_shape_of_groups_is_refused(info: OptimizerInfo) -> None:
    problem = LeastSquares()
    optimizer = info.optim_cls(problem.params)
    other = info.optim_cls([{"params": [problem.weight]}, {"params": [problem.bias]}])
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict(other.state_dict())
    other = info.optim_cls([problem.weight])
    with pytest.raises(ValueError, match="size of optimizer's group"):
        optimizer.load_state_dict(other.state_dict())


@each_optimizer
@pytest.mark.parametrize(
    ("name", "value"), [("scope", "global"), ("nonfinite", "skip"), ("loss_gap", "exact"), ("replica_group", None)]
)
def test_an_option_of_the_whole_optimizer_is_refused_in_a_group(info: OptimizerInfo, name: str, value: Any) -> None:
    """If it were accepted, it would have no effect, and the user would not notice."""
    problem = LeastSquares()
    with pytest.raises((ValueError, TypeError), match=name):
        info.optim_cls([{"params": [problem.weight]}, {"params": [problem.bias], name: value}])


@pytest.mark.parametrize("value", [-0.1, 1.0, float("nan"), float("inf"), "0.9", True])
def test_cap_of_a_group(value: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=rf"beta1_max: '?{value}'? .*must be"):
        AMAdamW([{"params": LeastSquares().params, "beta1_max": value}])


@each_optimizer
def test_keys_that_a_user_adds_to_a_group_stay(info: OptimizerInfo) -> None:
    """torch.optim also keeps unknown keys, because schedulers and frameworks store values there."""
    problem = LeastSquares()
    optimizer = info.optim_cls([{"params": problem.params, "note": "mine", "initial_lr": 0.1}])
    optimizer.step(problem.loss)
    assert optimizer.state_dict()["param_groups"][0]["note"] == "mine"
