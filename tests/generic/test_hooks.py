"""torch.optim's hooks and its profiler record work on these classes as on torch's own."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.profiler import ProfilerActivity, profile

from tests.generic.optimizers import LeastSquares, OptimizerInfo, each_optimizer


def _make(info: OptimizerInfo) -> tuple[LeastSquares, Any]:
    problem = LeastSquares()
    problem.loss()
    return problem, info.optim_cls(problem.params)


@each_optimizer
def test_step_hooks(info: OptimizerInfo) -> None:
    """Own and global hooks run in torch's order, receive the arguments of step, and can be removed."""
    _, optimizer = _make(info)
    calls: list[str] = []

    def hook(name: str) -> Any:
        def call(opt: Optimizer, args: tuple[Any, ...], kwargs: dict[Any, Any]) -> None:
            assert opt is optimizer
            calls.append(name)

        return call

    handles = [
        register_optimizer_step_pre_hook(hook("global pre")),
        register_optimizer_step_post_hook(hook("global post")),
        optimizer.register_step_pre_hook(hook("own pre")),
        optimizer.register_step_post_hook(hook("own post")),
    ]
    try:
        optimizer.step()
        assert calls == ["global pre", "own pre", "own post", "global post"]
    finally:
        for handle in handles:
            handle.remove()
    optimizer.step()
    assert len(calls) == 4


@each_optimizer
def test_step_pre_hook_may_change_the_arguments(info: OptimizerInfo) -> None:
    problem, optimizer = _make(info)
    calls: list[str] = []

    def closure() -> torch.Tensor:
        calls.append("closure")
        return problem.loss()

    optimizer.register_step_pre_hook(lambda opt, args, kwargs: ((opt, closure), {}))
    assert optimizer.step() is not None
    assert calls == ["closure"]


@each_optimizer
def test_step_pre_hook_may_change_gradients_and_rates(info: OptimizerInfo) -> None:
    problem, optimizer = _make(info)
    before = [param.detach().clone() for param in problem.params]

    def stop(opt: Optimizer, args: tuple[Any, ...], kwargs: dict[Any, Any]) -> None:
        for group in opt.param_groups:
            group["lr"] = 0.0

    optimizer.register_step_pre_hook(stop)
    optimizer.step()
    torch.testing.assert_close([param.detach() for param in problem.params], before, rtol=0, atol=0)


@each_optimizer
def test_state_dict_hooks(info: OptimizerInfo) -> None:
    _, optimizer = _make(info)
    optimizer.step()
    calls: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda opt: calls.append("pre"))
    optimizer.register_state_dict_post_hook(lambda opt, state_dict: calls.append("post"))
    optimizer.register_state_dict_post_hook(lambda opt, state_dict: {**state_dict, "note": "kept"})
    saved = optimizer.state_dict()
    assert calls == ["pre", "post"]
    assert saved["note"] == "kept"
    assert set(saved) == {"state", "param_groups", "note"}


@each_optimizer
def test_load_state_dict_hooks(info: OptimizerInfo) -> None:
    """The pre-hook may replace what is loaded; the post-hook runs after the state is loaded."""
    _, optimizer = _make(info)
    optimizer.step()
    saved = optimizer.state_dict()
    problem, resumed = _make(info)
    calls: list[str] = []

    def pre(opt: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        calls.append("pre")
        groups = [{**group, "lr": 0.25} for group in state_dict["param_groups"]]
        state = {index: {**values, "prev_lr": torch.tensor(0.5)} for index, values in state_dict["state"].items()}
        return {**state_dict, "param_groups": groups, "state": state}

    def post(opt: Optimizer) -> None:
        calls.append("post")
        assert opt.param_groups[0]["lr"] == 0.25
        assert float(opt.state[problem.weight]["step"]) == 1
        assert float(opt.state[problem.weight]["prev_lr"]) == 0.5

    resumed.register_load_state_dict_pre_hook(pre)
    resumed.register_load_state_dict_post_hook(post)
    resumed.load_state_dict(saved)
    assert calls == ["pre", "post"]
    assert resumed.param_groups[0]["lr"] == 0.25
    assert saved["param_groups"][0]["lr"] == 1e-3  # the caller's dict is unchanged


@each_optimizer
def test_hooks_survive_a_load_and_are_not_saved(info: OptimizerInfo) -> None:
    _, optimizer = _make(info)
    calls: list[str] = []
    optimizer.register_step_post_hook(lambda opt, args, kwargs: calls.append("post"))
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
    assert calls == ["post"]


@each_optimizer
def test_profiler_record(info: OptimizerInfo) -> None:
    problem, optimizer = _make(info)
    with profile(activities=[ProfilerActivity.CPU]) as prof:
        optimizer.step()
        optimizer.zero_grad()
    names = {event.key for event in prof.key_averages()}
    assert f"Optimizer.step#{info.name}.step" in names
    assert f"Optimizer.zero_grad#{info.name}.zero_grad" in names
    assert all(param.grad is None for param in problem.params)


@each_optimizer
def test_zero_grad(info: OptimizerInfo) -> None:
    problem, optimizer = _make(info)
    optimizer.zero_grad(set_to_none=False)
    assert all(torch.count_nonzero(param.grad) == 0 for param in problem.params)
    optimizer.zero_grad()
    assert all(param.grad is None for param in problem.params)


@each_optimizer
def test_is_a_torch_optimizer(info: OptimizerInfo) -> None:
    _, optimizer = _make(info)
    assert isinstance(optimizer, Optimizer)
    assert not hasattr(optimizer, "_step_supports_amp_scaling")
    assert set(optimizer.defaults) >= {"lr", "weight_decay", "maximize", "foreach"}
