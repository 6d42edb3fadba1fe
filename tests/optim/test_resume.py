"""Exact resume: state_dict through torch.save, deepcopy and pickle continue bitwise."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch

from tests.optim.harness import KERNELS, SCOPES, assert_bitwise, build, params_of, snapshot

SHAPES = [(7, 5), (13,), (), (0,), (4, 3, 3)]
DTYPES = {
    "float64": [torch.float64] * 5,
    "float32": [torch.float32] * 5,
    "bfloat16": [torch.bfloat16] * 5,
    "float16": [torch.float16] * 5,
    "mixed": [torch.float32, torch.bfloat16, torch.float64, torch.float32, torch.float16],
}
RATES = [0.9, 0.4, 0.7, 0.2, 0.5, 0.8]


def make(kind: str, dtypes: str, *, named: bool = True, weights: list[torch.Tensor] | None = None, **options: Any):
    gen = torch.Generator().manual_seed(0)
    params = []
    for i, (shape, dtype) in enumerate(zip(SHAPES, DTYPES[dtypes], strict=True)):
        value = torch.randn(shape, generator=gen, dtype=torch.float64).to(dtype) if weights is None else weights[i]
        params.append((f"w{i}", torch.nn.Parameter(value.detach().clone())))
    given = params if named else [p for _, p in params]
    groups = [{"params": given[:2], "weight_decay": 0.05}, {"params": given[2:], "weight_decay": 0.0}]
    return build(kind, groups, lr=0.1, **options)


def run(optimizer: torch.optim.Optimizer, start: int, stop: int) -> None:
    """Run with gradients that depend on step and weights, so that any difference grows."""
    for step in range(start, stop):
        gen = torch.Generator().manual_seed(step)
        for group in optimizer.param_groups:
            group["lr"] = RATES[step % len(RATES)]
        for i, p in enumerate(params_of(optimizer)):
            noise = 0.1 * torch.randn(p.shape, generator=gen, dtype=torch.float64).to(p.dtype)
            p.grad = None if i == 1 and step in (0, 1, 4) else (0.7 * p.detach() + noise)
        optimizer.step()


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def options_of(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    return [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]


def assert_same_run(a: torch.optim.Optimizer, b: torch.optim.Optimizer) -> None:
    assert_bitwise(snapshot(a), snapshot(b))
    assert list(a.momentum()) == list(b.momentum())
    assert_bitwise(list(a.momentum().values()), list(b.momentum().values()))
    assert options_of(a) == options_of(b)


@pytest.mark.parametrize("stop_at", [1, 4])
@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("dtypes", list(DTYPES))
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_state_dict_resumes_bitwise(kind: str, dtypes: str, scope: str, named: bool, stop_at: int) -> None:
    straight = make(kind, dtypes, scope=scope, named=named)
    run(straight, 0, stop_at)
    state = through_a_file(straight.state_dict())
    assert set(state) == {"state", "param_groups"}
    resumed = make(kind, dtypes, scope=scope, named=named, weights=params_of(straight))
    resumed.load_state_dict(state)
    assert_same_run(straight, resumed)
    run(straight, stop_at, 9)
    run(resumed, stop_at, 9)
    assert_same_run(straight, resumed)


@pytest.mark.parametrize("foreach", KERNELS)
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_every_kernel_resumes_bitwise(kind: str, foreach: bool | None) -> None:
    straight = make(kind, "mixed", foreach=foreach)
    run(straight, 0, 4)
    resumed = make(kind, "mixed", foreach=foreach, weights=params_of(straight))
    resumed.load_state_dict(through_a_file(straight.state_dict()))
    run(straight, 4, 8)
    run(resumed, 4, 8)
    assert_same_run(straight, resumed)


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_loading_into_an_optimizer_that_has_stepped(kind: str) -> None:
    """A rollback must leave nothing of the abandoned steps."""
    straight = make(kind, "float32")
    run(straight, 0, 3)
    saved, weights = copy.deepcopy(straight.state_dict()), [p.detach().clone() for p in params_of(straight)]
    run(straight, 3, 6)
    reached = snapshot(straight)
    with torch.no_grad():
        for p, w in zip(params_of(straight), weights, strict=True):
            p.copy_(w)
    straight.load_state_dict(saved)
    run(straight, 3, 6)
    assert_bitwise(snapshot(straight), reached)


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_state_dict_holds_plain_values_in_the_groups(kind: str) -> None:
    """`weights_only=True` loads it, and converters find AdamW's names."""
    optimizer = make(kind, "float32")
    run(optimizer, 0, 2)
    state = optimizer.state_dict()
    plain = (bool, int, float, str, tuple, list, type(None))
    assert all(isinstance(v, plain) for g in state["param_groups"] for v in g.values())
    keys = {"step", "exp_avg", "exp_avg_sq"} if kind == "adamw" else {"step", "momentum_buffer"}
    assert all(keys | {"beta_prod", "beta", "prev_lr"} == set(s) for s in state["state"].values())
    assert all(torch.is_tensor(v) for s in state["state"].values() for v in s.values())


@pytest.mark.parametrize("dtypes", ["float32", "bfloat16", "mixed"])
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
@pytest.mark.parametrize("stop_at", [0, 3])
def test_a_copied_optimizer_continues_bitwise(kind: str, how: str, dtypes: str, stop_at: int) -> None:
    optimizer = make(kind, dtypes, scope="group", nonfinite="propagate")
    run(optimizer, 0, stop_at)
    copied = copy.deepcopy(optimizer) if how == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
    assert type(copied) is type(optimizer)
    assert all(p is not q for p, q in zip(params_of(copied), params_of(optimizer), strict=True))
    assert_same_run(copied, optimizer)
    run(optimizer, stop_at, 7)
    run(copied, stop_at, 7)
    assert_same_run(copied, optimizer)
    params_of(copied)[0].grad = torch.full_like(params_of(copied)[0], float("nan"))  # nonfinite is copied, too
    copied.step()
    assert not bool(copied.last_step_skipped)


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_saved_groups_that_lack_a_newer_key_get_the_default(kind: str) -> None:
    straight = make(kind, "float32")
    run(straight, 0, 3)
    state = copy.deepcopy(straight.state_dict())
    for group in state["param_groups"]:
        del group["lambd"]
    resumed = make(kind, "float32", weights=params_of(straight), lambd=0.1)
    resumed.load_state_dict(state)
    assert all(g["lambd"] == 0.1 for g in resumed.param_groups)
    run(straight, 3, 6)
    run(resumed, 3, 6)
    assert_bitwise(snapshot(straight), snapshot(resumed))


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_low_precision_moments_and_wide_scalars_come_back_in_their_dtypes(kind: str) -> None:
    """torch.optim casts every float state to the parameter's dtype on load, but must not cast the scalars."""
    straight = make(kind, "bfloat16")
    run(straight, 0, 5)
    resumed = make(kind, "bfloat16", weights=params_of(straight))
    resumed.load_state_dict(through_a_file(straight.state_dict()))
    for p in params_of(resumed):
        state = resumed.state[p]
        assert all(state[k].dtype == torch.float32 for k in ("step", "beta_prod", "beta", "prev_lr"))
        assert all(v.dtype == torch.bfloat16 for k, v in state.items() if v.dim() or k.startswith(("exp", "mom")))
