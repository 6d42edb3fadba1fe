"""A model that is moved, cast or swapped under its optimizer, and states on another device than their parameters."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from am_lightning import AMSGD, AMAdamW, clip_grad_norm_
from tests.optim.harness import assert_bitwise, assert_close, snapshot, to_numpy

KERNELS: list[dict[str, Any]] = [{"fused": False}, {"foreach": False}, {"foreach": True}, {"fused": True}]
each_kernel = pytest.mark.parametrize("options", KERNELS, ids=["chunked", "reference", "foreach", "fused"])


@pytest.fixture(params=[True, False], ids=["swapped", "in place"])
def swaps(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Set how torch converts a module: the tensor objects get other contents, or the tensors get other data."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(request.param)
    yield bool(request.param)
    torch.__future__.set_swap_module_params_on_conversion(before)


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1))


def step(model: nn.Module, optimizer: Any, seed: int) -> None:
    like = next(model.parameters())
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    model(x.to(like)).square().mean().backward()
    if isinstance(optimizer, AMAdamW | AMSGD):
        clip_grad_norm_(optimizer, 1.0)
    optimizer.step()


def train(cls: Any, dtype: torch.dtype, at: int, *, cast_before: bool, **options: Any) -> tuple[nn.Module, Any]:
    """Make six steps. The model is cast after ``at`` of them, or before its optimizer is built."""
    model = make_model()
    if cast_before:
        model.to(dtype)
    optimizer = cls(model.named_parameters(), lr=1e-2, **options)
    for seed in range(6):
        if seed == at:
            model.to(dtype)
        step(model, optimizer, seed)
    return model, optimizer


@each_kernel
@pytest.mark.parametrize("at", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_a_model_that_is_cast(dtype: torch.dtype, at: int, options: dict[str, Any], swaps: bool) -> None:
    """The run equals that of a model that had the dtype from the start. AdamW continues only if it has made no step."""
    model, optimizer = train(AMAdamW, dtype, at, cast_before=False, **options)
    other, expected = train(AMAdamW, dtype, at, cast_before=True, **options)
    tol = {torch.float64: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert p.dtype == dtype and optimizer.state[p]["exp_avg"].dtype == (dtype if at == 0 else torch.float32)
        assert float(optimizer.state[p]["step"]) == 6
        assert_close(to_numpy(p), to_numpy(q), tol, "weights")
    for a, b in zip(optimizer.momentum().values(), expected.momentum().values(), strict=True):
        assert abs(float(a) - float(b)) <= 10 * tol
    if at == 0:
        train(torch.optim.AdamW, dtype, at, cast_before=False)
    else:
        with pytest.raises(RuntimeError, match="dtype"):
            train(torch.optim.AdamW, dtype, at, cast_before=False)


@pytest.mark.parametrize("cls", [AMAdamW, AMSGD])
def test_a_model_that_goes_to_another_device_after_a_step(cls: Any) -> None:
    """States and sums follow; "meta" stands for the device. AdamW leaves its states on the old device."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model = make_model()
        optimizer = cls(model.named_parameters(), lr=1e-2)
        step(model, optimizer, 0)
        model.to("meta")
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    for p in model.parameters():
        assert p.is_meta and all(value.is_meta for value in optimizer.state[p].values())
    assert optimizer.last_step_skipped.is_meta and all(beta.is_meta for beta in optimizer.momentum().values())


@pytest.mark.parametrize("cls", [AMAdamW, AMSGD])
def test_nothing_of_ours_is_a_weak_reference_to_a_parameter(cls: Any) -> None:
    """torch swaps no tensor that has a weak reference: torchao's conversions, module.to under FSDP2."""
    model = make_model()
    optimizer = cls(model.named_parameters(), lr=1e-2)
    optimizer.bind_model(model)
    step(model, optimizer, 0)
    copied = copy.deepcopy(optimizer)
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.momentum(), optimizer.report(), optimizer.describe(), optimizer.caps()
    for p in (*model.parameters(), *(p for group in copied.param_groups for p in group["params"])):
        assert weakref.getweakrefcount(p) == 0


def test_a_parameter_that_becomes_a_subclass_by_a_swap() -> None:
    """torchao converts a model this way: the same objects then hold a tensor subclass."""
    model = make_model()
    optimizer = AMAdamW(model.named_parameters(), lr=1e-2, foreach=False)
    step(model, optimizer, 0)
    param = model[0].weight
    held = param.detach().clone()
    param.grad = None
    torch.utils.swap_tensors(param, nn.Parameter(TwoTensor(held.clone(), held.clone())))
    assert isinstance(model[0].weight, TwoTensor) and model[0].weight is param
    optimizer.zero_grad()
    param.grad = TwoTensor(torch.ones(5, 6), torch.ones(5, 6))
    optimizer.step()
    assert not optimizer.last_step_skipped and float(optimizer.state[param]["step"]) == 2
    assert not torch.equal(param.detach().a, held)


@each_kernel
def test_a_state_of_adamw_put_in_place(options: dict[str, Any]) -> None:
    """AdamW's ``step`` may be on any device, or a plain number. It moves to the parameter's device."""
    ends = []
    for kind in ("tensor", "number", "float64"):
        model = make_model()
        torchs = torch.optim.AdamW(model.parameters(), lr=1e-2)
        step(model, torchs, 0)
        for state in torchs.state.values():
            if kind != "tensor":
                state["step"] = 1 if kind == "number" else state["step"].double()
        ours = AMAdamW(model.parameters(), lr=1e-2, **options)
        ours.state = torchs.state
        step(model, ours, 1)
        for state in ours.state.values():
            assert state["step"].dtype == torch.float32 and float(state["step"]) == 2
        ends.append(snapshot(ours))
    assert_bitwise(ends[0], ends[1])
    assert_bitwise(ends[0], ends[2])


def test_the_step_of_a_state_goes_to_its_parameters_device() -> None:
    """AdamW's step is on the CPU wherever its parameters are; "meta" stands for a GPU."""
    p = nn.Parameter(torch.ones(3, device="meta"))
    p.grad = torch.ones_like(p)
    torchs = torch.optim.AdamW([p])
    torchs.step()
    assert torchs.state[p]["step"].device.type == "cpu"
    ours = AMAdamW([p])
    ours.step()  # builds the layout
    ours.state = torchs.state
    ours.step()
    assert ours.state[p]["step"].is_meta and ours.state[p]["beta_prod"].is_meta
