"""``optimizer.state`` belongs to the user: replacing or emptying it restarts the moments and beta_t."""

from __future__ import annotations

import copy
import pickle
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import Optimizer

from am_lightning import AMSGD, AMAdamW

MADE: dict[str, Callable[[list[Any]], Optimizer]] = {
    "default": lambda params: AMAdamW(params, lr=0.05),
    "plain": lambda params: AMAdamW(params, lr=0.05, foreach=False),
    "foreach": lambda params: AMAdamW(params, lr=0.05, foreach=True),
    "sgd": lambda params: AMSGD(params, lr=0.05),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=0.05),
}


def new_dict(optimizer: Optimizer) -> None:
    optimizer.state = defaultdict(dict)


def through_setstate(optimizer: Optimizer) -> None:
    optimizer.__setstate__({"state": defaultdict(dict)})


def emptied(optimizer: Optimizer) -> None:
    optimizer.state.clear()


def copied(optimizer: Optimizer) -> None:
    """Replace the state by copies of its tensors."""
    optimizer.state = defaultdict(dict, {p: copy.deepcopy(state) for p, state in optimizer.state.items()})


def saved_and_loaded(optimizer: Optimizer) -> None:
    optimizer.load_state_dict(pickle.loads(pickle.dumps(optimizer.state_dict())))


def one_parameter_emptied(optimizer: Optimizer) -> None:
    """Empty the second parameter's state, as people do for dead neurons."""
    optimizer.state[optimizer.param_groups[0]["params"][1]] = {}


def run(
    make: Callable[[list[Any]], Optimizer], steps: int, change: Callable[[Optimizer], None] | None, start: Any
) -> Any:
    """Return the weights after each step, and the optimizer; ``change`` is called before the fourth step."""
    params = [torch.nn.Parameter(p.clone()) for p in start]
    optimizer, seen = make(params), []
    for step in range(steps):
        if step == 3 and change is not None:
            change(optimizer)
        generator = torch.Generator().manual_seed(step if steps > 3 else step + 3)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator) + p.detach()
        optimizer.step()
        seen.append([p.detach().clone() for p in params])
    return seen, optimizer


def equal(ours: list[Any], theirs: list[Any]) -> bool:
    return all(
        torch.equal(a, b) for mine, other in zip(ours, theirs, strict=True) for a, b in zip(mine, other, strict=True)
    )


START = [torch.linspace(-1, 1, 12).reshape(3, 4), torch.linspace(0.5, 2, 5)]


@pytest.mark.parametrize("kind", MADE)
@pytest.mark.parametrize("reset", [new_dict, through_setstate, emptied])
def test_after_a_reset_it_is_a_new_optimizer(kind: str, reset: Callable[[Optimizer], None]) -> None:
    seen, optimizer = run(MADE[kind], 6, reset, START)
    again, fresh = run(MADE[kind], 3, None, seen[2])
    assert equal(again, seen[3:])
    for ours, theirs in zip(optimizer.state.values(), fresh.state.values(), strict=True):
        assert float(ours.get("step", 3)) == float(theirs.get("step", 3)) == 3
    if kind != "AdamW":
        assert [float(b) for b in optimizer.momentum().values()] == [float(b) for b in fresh.momentum().values()]


@pytest.mark.parametrize("kind", MADE)
@pytest.mark.parametrize("change", [copied, saved_and_loaded])
def test_a_state_of_the_same_values_resumes(kind: str, change: Callable[[Optimizer], None]) -> None:
    seen, _ = run(MADE[kind], 6, change, START)
    unbroken, _ = run(MADE[kind], 6, None, START)
    assert equal(seen, unbroken)


@pytest.mark.parametrize("kind", MADE)
def test_one_parameter_starts_again_and_the_other_continues(kind: str) -> None:
    seen, optimizer = run(MADE[kind], 6, one_parameter_emptied, START)
    if kind == "sgd":  # scope "global": the two share a beta_t
        assert [float(s["step"]) for s in optimizer.state.values()] == [6, 3]
        return
    unbroken, _ = run(MADE[kind], 6, None, START)
    again, _ = run(MADE[kind], 3, None, seen[2])
    assert torch.equal(seen[-1][0], unbroken[-1][0])
    # Only this tensor has other gradients than before, and its steps are those of a new optimizer.
    assert [float(s["step"]) for s in optimizer.state.values()] == [6, 3]
    assert torch.equal(seen[-1][1], again[-1][1])


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("foreach", [None, True, False])
def test_a_reset_by_hand_is_a_fresh_start(foreach: bool | None, in_place: bool) -> None:
    """Step and moments are set to 0, as people do with AdamW: the next steps are those of a new optimizer."""

    def steps(optimizer: torch.optim.Optimizer, param: torch.Tensor, numbers: range) -> None:
        for number in numbers:
            param.grad = torch.sin(torch.arange(6.0) + 0.7 * number) + param.detach()
            optimizer.step()

    for kind, options in ((torch.optim.AdamW, {}), (AMAdamW, {"foreach": foreach})):
        param = torch.nn.Parameter(torch.linspace(-1, 1, 6))
        optimizer = kind([param], lr=0.05, **options)
        steps(optimizer, param, range(20))
        state = optimizer.state[param]
        state["exp_avg"].zero_()
        state["exp_avg_sq"].zero_()
        if in_place:
            state["step"].zero_()
        else:
            state["step"] = torch.tensor(0.0)
        twin = torch.nn.Parameter(param.detach().clone())
        steps(optimizer, param, range(20, 26))
        steps(kind([twin], lr=0.05, **options), twin, range(20, 26))
        assert torch.equal(param, twin), kind


def test_a_negative_learning_rate_is_saved_and_loaded() -> None:
    """A schedule may end slightly below zero; AdamW loads its own save with such a rate."""
    for kind in (torch.optim.AdamW, AMAdamW):
        param = torch.nn.Parameter(torch.ones(3))
        optimizer = kind([param], lr=0.1)
        for lr in (0.1, -0.001):
            optimizer.param_groups[0]["lr"] = lr
            param.grad = torch.ones(3)
            optimizer.step()
        other = kind([torch.nn.Parameter(torch.ones(3))], lr=0.1)
        other.load_state_dict(optimizer.state_dict())
        assert other.param_groups[0]["lr"] == -0.001


STEPS_BY_HAND = {"int": 3, "float": 0.0, "bool": True, "None": None, "text": "3", "two numbers": torch.ones(2)}


def step_by_hand(make: Callable[[list[Any]], Optimizer], value: Any) -> tuple[Optimizer, list[torch.Tensor]]:
    """Make two steps, set the first parameter's ``step`` to ``value``, and make another step."""
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = make(params)
    for number in range(3):
        for param in params:
            param.grad = torch.sin(torch.arange(3.0) + number)
        if number == 2:
            optimizer.state[params[0]]["step"] = value
        optimizer.step()
    return optimizer, params


@pytest.mark.parametrize("kind", MADE)
@pytest.mark.parametrize("what", STEPS_BY_HAND)
def test_a_step_that_is_no_tensor_is_named(kind: str, what: str) -> None:
    text = "0.0.* 'step', which must be a tensor of one number" if kind != "AdamW" else None
    with pytest.raises(RuntimeError, match=text):
        step_by_hand(MADE[kind], copy.copy(STEPS_BY_HAND[what]))


@pytest.mark.parametrize("key", ["beta_prod", "beta", "prev_lr"])
def test_so_is_another_number(key: str) -> None:
    optimizer, (first, second) = step_by_hand(MADE["default"], torch.tensor(2.0))
    before = [copy.deepcopy(optimizer.state[second]), second.detach().clone()]
    optimizer.state[first][key] = 0.5
    with pytest.raises(RuntimeError, match=f"has a float as '{key}', which must be a tensor of one number"):
        optimizer.step()
    after = optimizer.state[second]
    assert torch.equal(second, before[1]) and all(torch.equal(after[name], was) for name, was in before[0].items())


@pytest.mark.parametrize("kind", MADE)
@pytest.mark.parametrize("value", [torch.tensor([2.0]), torch.tensor([[2.0]]), torch.tensor(2)], ids=str)
def test_a_step_of_one_element_is_taken(kind: str, value: torch.Tensor) -> None:
    """``step`` may have any shape. AdamW's foreach refuses an integer."""
    if kind == "AdamW" and value.dim() == 0:
        return
    optimizer, params = step_by_hand(MADE[kind], value.clone())
    _, expected = step_by_hand(MADE[kind], torch.tensor(2.0))
    assert all(map(torch.equal, params, expected))
    assert [float(state["step"]) for state in optimizer.state.values()] == [3, 3]
