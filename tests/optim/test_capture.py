"""An unsupported capture of a CUDA graph is refused before states are created, whose zeros it would only record."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from am_lightning import AMSGD, AMAdamW
from am_lightning.optim import state_store as scalars
from am_lightning.optim.kernels import transfer
from am_lightning.optim.param_state import SCALARS
from tests.optim.harness import assert_bitwise, snapshot

KINDS = pytest.mark.parametrize("kind", [AMAdamW, AMSGD])


def make(kind: type[Any]) -> Any:
    return kind([(f"w{i}", torch.nn.Parameter(torch.full((3, 2), 1.0 + i))) for i in range(3)], lr=0.1)


def step(optimizer: Any, number: int, *, without: int | None = None) -> None:
    for i, param in enumerate(optimizer.param_groups[0]["params"]):
        param.grad = None if i == without else torch.full_like(param, 0.5 + number + i)
    optimizer.step()


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make all devices report that a graph is being captured."""

    def begin() -> Any:
        context = monkeypatch.context()
        context.__enter__().setattr(transfer, "is_capturing", lambda device: True)
        return context

    return begin


@KINDS
def test_a_first_step_in_a_capture_leaves_nothing_behind(kind: type[Any], capture: Any) -> None:
    optimizer, expected = make(kind), make(kind)
    context = capture()
    with pytest.raises(RuntimeError, match="has no optimizer state that a step has used: make a step"):
        step(optimizer, 0)
    context.__exit__(None, None, None)
    assert not optimizer.state
    for number in range(3):
        step(optimizer, number)
        step(expected, number)
    assert_bitwise(snapshot(optimizer), snapshot(expected))


@KINDS
def test_a_parameter_that_first_steps_in_a_capture_is_refused(kind: type[Any], capture: Any) -> None:
    optimizer, expected = make(kind), make(kind)
    step(optimizer, 0, without=1)
    step(expected, 0, without=1)
    context = capture()
    with pytest.raises(RuntimeError, match="has no optimizer state that a step has used"):
        step(optimizer, 1)
    step(optimizer, 1, without=1)  # a parameter that has stepped before continues
    context.__exit__(None, None, None)
    assert len(optimizer.state) == 2
    step(expected, 1, without=1)
    step(optimizer, 2)
    step(expected, 2)
    assert_bitwise(snapshot(optimizer), snapshot(expected))


def test_states_that_adamw_wrote_are_not_completed_in_a_capture(capture: Any) -> None:
    optimizer = make(AMAdamW)
    step(optimizer, 0)
    state = optimizer.state[optimizer.param_groups[0]["params"][0]]
    for name in SCALARS:
        del state[name]
    context = capture()
    with pytest.raises(RuntimeError, match="has no optimizer state that a step has used"):
        step(optimizer, 1)
    context.__exit__(None, None, None)
    assert not state.keys() & set(SCALARS)


@KINDS
def test_states_that_were_loaded_are_not_put_into_one_tensor_in_a_capture(
    kind: type[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every replay would begin with the loaded numbers, so the captured step reads and writes the existing tensors."""
    optimizer, expected = make(kind), make(kind)
    for each in (optimizer, expected):
        step(each, 0)
        each.load_state_dict(each.state_dict())
    loaded = [state["beta_prod"] for state in optimizer.state.values()]
    with monkeypatch.context() as patch:
        patch.setattr(scalars, "is_capturing", lambda device: True)
        step(optimizer, 1)
    step(expected, 1)
    assert all(a is b for a, b in zip(loaded, (s["beta_prod"] for s in optimizer.state.values()), strict=True))
    assert all(a is not b for a, b in zip(loaded, (s["beta_prod"] for s in expected.state.values()), strict=True))
    assert_bitwise(snapshot(optimizer), snapshot(expected))
