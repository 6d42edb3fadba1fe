"""torch.optim's guarantees about state: state_dict in and out, older ones, copies, pickles, a plain repr."""

from __future__ import annotations

import io
import pickle
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from tests.generic.optimizers import STATE_NAMES, LeastSquares, OptimizerInfo, each_case, each_optimizer, with_own_lr


def _trained(info: OptimizerInfo, steps: int = 3, **kwargs: Any) -> tuple[LeastSquares, Any]:
    problem = LeastSquares()
    optimizer = info.optim_cls(problem.params, **with_own_lr(kwargs))
    for _ in range(steps):
        optimizer.step(problem.loss)
    return problem, optimizer


def _copy_of(problem: LeastSquares) -> LeastSquares:
    other = LeastSquares()
    with torch.no_grad():
        for param, source in zip(other.params, problem.params, strict=True):
            param.copy_(source)
    return other


def _assert_same(first: Any, second: Any) -> None:
    """Require equal structure, types and numbers, and bitwise equal tensors."""
    assert type(first) is type(second)
    if isinstance(first, Tensor):
        torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)
    elif isinstance(first, dict):
        assert list(first) == list(second)
        for key in first:
            _assert_same(first[key], second[key])
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            _assert_same(one, other)
    else:
        assert first == second


@each_case
def test_state_dict_resumes_bitwise(info: OptimizerInfo, kwargs: dict[str, Any]) -> None:
    problem, optimizer = _trained(info, **kwargs)
    other = _copy_of(problem)
    resumed = info.optim_cls(other.params, **with_own_lr(kwargs))
    saved = deepcopy(optimizer.state_dict())
    given = deepcopy(saved)
    resumed.load_state_dict(given)
    _assert_same(given, saved)  # loading does not change its input
    _assert_same(resumed.state_dict(), optimizer.state_dict())
    for _ in range(3):
        optimizer.step(problem.loss)
        resumed.step(other.loss)
        torch.testing.assert_close(other.params, problem.params, rtol=0, atol=0)
    _assert_same(resumed.state_dict(), optimizer.state_dict())


@each_case
def test_save_load_equality_with_weights_only(info: OptimizerInfo, kwargs: dict[str, Any], tmp_path: Path) -> None:
    _, optimizer = _trained(info, **kwargs)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    loaded = torch.load(tmp_path / "optimizer.pt", weights_only=True)
    _assert_same(loaded, optimizer.state_dict())
    assert set(loaded) == {"state", "param_groups"}


@each_case
def test_state_dict_is_deterministic(info: OptimizerInfo, kwargs: dict[str, Any]) -> None:
    """Two runs of equal but not identical parameters give the same state, with keys in the same order."""
    _, first = _trained(info, **kwargs)
    _, second = _trained(info, **kwargs)
    _assert_same(first.state_dict(), second.state_dict())


@each_case
def test_non_empty_state(info: OptimizerInfo, kwargs: dict[str, Any]) -> None:
    problem = LeastSquares()
    optimizer = info.optim_cls(problem.params, **with_own_lr(kwargs))
    assert all(len(state) == 0 for state in optimizer.state.values())  # no state before the first step
    optimizer.step(problem.loss)
    for param in problem.params:
        state = optimizer.state[param]
        assert "step" in state
        assert float(state["step"]) == 1
        assert all(isinstance(value, Tensor) for value in state.values())
        for name in STATE_NAMES[info.optim_cls]:
            assert state[name].shape == param.shape
            assert state[name].dtype == param.dtype
        extra = set(state) - set(STATE_NAMES[info.optim_cls])
        assert all(state[name].ndim == 0 for name in extra)


@each_case
def test_can_load_older_state_dict(info: OptimizerInfo, kwargs: dict[str, Any]) -> None:
    """A saved group may lack any key, or all that torch.optim does not know. The optimizer keeps its values."""
    problem, optimizer = _trained(info, **kwargs)
    saved = optimizer.state_dict()
    keys = [key for key in saved["param_groups"][0] if key != "params"]
    for missing in [*[[key] for key in keys if key != "lr"], [key for key in keys if key not in ("lr", "betas")]]:
        older = deepcopy(saved)
        for group in older["param_groups"]:
            for key in missing:
                del group[key]
        other = _copy_of(problem)
        resumed = info.optim_cls(other.params, **with_own_lr(kwargs))
        expected = deepcopy(resumed.param_groups[0])
        resumed.load_state_dict(older)
        for key in missing:
            assert resumed.param_groups[0].get(key) == expected.get(key), key
        resumed.step(other.loss)
        assert all(torch.isfinite(param).all() for param in other.params)


@each_optimizer
def test_unpickled_groups_that_lack_a_key_get_its_default(info: OptimizerInfo) -> None:
    problem, optimizer = _trained(info)
    content = optimizer.__getstate__()
    defaults = dict(optimizer.defaults)
    bare = {"params": problem.params, "lr": 1e-3}
    if "betas" in defaults:
        bare["betas"] = defaults["betas"]
    older = info.optim_cls.__new__(info.optim_cls)
    older.__setstate__({**content, "param_groups": [bare]})
    for key in set(defaults) - {"lr", "betas"}:
        assert older.param_groups[0][key] == defaults[key], key
    older.step(problem.loss)


@each_optimizer
def test_load_nontensor_step(info: OptimizerInfo) -> None:
    """Old state dicts hold `step` as a plain number."""
    problem, optimizer = _trained(info)
    other = _copy_of(problem)
    resumed = info.optim_cls(other.params)
    older = deepcopy(optimizer.state_dict())
    for state in older["state"].values():
        state["step"] = float(state["step"])
    resumed.load_state_dict(older)
    for _ in range(2):
        optimizer.step(problem.loss)
        resumed.step(other.loss)
    torch.testing.assert_close(other.params, problem.params, rtol=0, atol=0)
    _assert_same(resumed.state_dict(), optimizer.state_dict())


@each_optimizer
@pytest.mark.parametrize("saved_named", [False, True])
@pytest.mark.parametrize("loaded_named", [False, True])
def test_can_load_from_to_named_state_dict(info: OptimizerInfo, saved_named: bool, loaded_named: bool) -> None:
    problem = LeastSquares()
    optimizer = info.optim_cls(problem.named() if saved_named else problem.params)
    optimizer.step(problem.loss)
    saved = optimizer.state_dict()
    assert ("param_names" in saved["param_groups"][0]) == saved_named
    other = _copy_of(problem)
    resumed = info.optim_cls(other.named() if loaded_named else other.params)
    resumed.load_state_dict(deepcopy(saved))
    assert ("param_names" in resumed.param_groups[0]) == (saved_named or loaded_named)
    optimizer.step(problem.loss)
    resumed.step(other.loss)
    torch.testing.assert_close(other.params, problem.params, rtol=0, atol=0)


@each_optimizer
@pytest.mark.parametrize("loaded", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_state_follows_the_parameters_dtype(info: OptimizerInfo, loaded: torch.dtype) -> None:
    """Moments are cast to their parameters' dtype; scalars stay float32 or wider and keep their value."""
    _, optimizer = _trained(info)
    problem = LeastSquares(dtype=loaded)
    resumed = info.optim_cls(problem.params)
    resumed.load_state_dict(optimizer.state_dict())
    for param, source in zip(problem.params, optimizer.param_groups[0]["params"], strict=True):
        for name, value in resumed.state[param].items():
            expected = optimizer.state[source][name]
            if name in STATE_NAMES[info.optim_cls]:
                assert value.dtype == loaded
            else:
                assert value.dtype in (torch.float32, torch.float64)
                assert value == expected
    resumed.step(problem.loss)


def _public(thing: Any) -> set[str]:
    return {name for name in vars(thing) if not name.startswith("_")}


@each_case
def test_deepcopy_and_pickle_keep_all_public_attributes(info: OptimizerInfo, kwargs: dict[str, Any]) -> None:
    problem, optimizer = _trained(info, **kwargs)
    for copied in (deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert type(copied) is type(optimizer)
        assert _public(copied) == _public(optimizer)
        _assert_same(copied.state_dict(), optimizer.state_dict())
        for param in copied.param_groups[0]["params"]:
            param.grad = torch.ones_like(param)
        copied.step(lambda: torch.tensor(1.0))
        betas = copied.momentum()
        assert len(betas) == len(problem.params)


@each_optimizer
def test_whole_optimizer_goes_through_torch_save(info: OptimizerInfo) -> None:
    _, optimizer = _trained(info)
    file = io.BytesIO()
    torch.save(optimizer, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    _assert_same(loaded.state_dict(), optimizer.state_dict())


@each_case
def test_optimizer_can_be_printed(info: OptimizerInfo, kwargs: dict[str, Any]) -> None:
    problem = LeastSquares()
    optimizer = info.optim_cls([{"params": [problem.weight]}, {"params": [problem.bias], "lr": 0.5}], **kwargs)
    text = repr(optimizer)
    assert text.startswith(info.name)
    assert "Parameter Group 0" in text
    assert "lr: 0.5" in text.split("Parameter Group 1")[1]
    for key in set(optimizer.param_groups[0]) - {"params"}:
        assert f"{key}: " in text


@each_optimizer
def test_nothing_of_this_class_hangs_on_the_group_but_plain_values(info: OptimizerInfo) -> None:
    _, optimizer = _trained(info)
    plain = (int, float, bool, str, type(None), Tensor)
    for group in optimizer.state_dict()["param_groups"]:
        for key, value in group.items():
            values = value if isinstance(value, (list, tuple)) else [value]
            assert all(isinstance(each, plain) for each in values), key
        assert "replica_group" not in group


@each_optimizer
def test_moments_have_the_parameter_s_memory_format(info: OptimizerInfo) -> None:
    weight = Parameter(torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last))
    optimizer = info.optim_cls([weight])
    weight.grad = torch.randn_like(weight)
    optimizer.step()
    for name in STATE_NAMES[info.optim_cls]:
        assert optimizer.state[weight][name].stride() == weight.stride()
