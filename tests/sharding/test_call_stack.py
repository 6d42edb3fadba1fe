"""The call stack is searched while there is no state or layout, and in no ordinary step after the first."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint.state_dict as dcp
import torch.distributed.optim  # ZeroRedundancyOptimizer is searched for only if its module is imported
from torch import nn

from am_lightning import AMSGD, AMAdamW, clip_grad_norm_
from am_lightning.distributed import call_stack
from am_lightning.loggers import attach
from tests.sharding.frames import count_frames
from tests.sharding.pool import Pool

MAKE: dict[str, Callable[..., Any]] = {
    "adamw": lambda params: AMAdamW(params, lr=0.1),
    "global": lambda params: AMAdamW(params, lr=0.1, scope="global"),
    "tensor lr": lambda params: AMAdamW(params, lr=torch.tensor(0.1), capturable=True),
    "sgd": lambda params: AMSGD(params, lr=0.1),
    "exact gap": lambda params: AMSGD(params, lr=0.1, loss_gap="exact"),
    "torch": lambda params: torch.optim.AdamW(params, lr=0.1),
}


@pytest.fixture
def walked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Count the frames that are looked at, with everything that is searched for counted as imported."""
    monkeypatch.setitem(sys.modules, "deepspeed", types.ModuleType("deepspeed"))
    with count_frames() as counter:
        yield counter


def make_step(model: nn.Module, optimizer: Any, number: int) -> None:
    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (model(torch.ones(2, 3)) - number).square().sum()
        loss.backward()
        if not isinstance(optimizer, torch.optim.AdamW) or isinstance(optimizer, AMAdamW):
            clip_grad_norm_(optimizer, 1.0)
        return loss

    optimizer.step(closure)


@pytest.mark.parametrize("logged", [False, True])
@pytest.mark.parametrize("kind", MAKE)
def test_no_step_after_the_first_walks_the_stack(kind: str, logged: bool, walked: list[int]) -> None:
    """A log, clipping, a checkpoint and a call of momentum() come between the steps."""
    model = nn.Linear(3, 2)
    optimizer = MAKE[kind](model.named_parameters())
    ours = kind != "torch"
    if logged and ours:
        attach(optimizer, lambda scalars, step: None, every=1)
    make_step(model, optimizer, 0)
    assert (walked[0] > 0) == ours, "otherwise this test sees nothing"
    walked[0] = 0
    for number in range(1, 5):
        make_step(model, optimizer, number)
        optimizer.state_dict()
        if ours:
            optimizer.momentum()
    assert walked[0] == 0


def test_a_new_layout_may_look_once(walked: list[int]) -> None:
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    optimizer = AMAdamW(model.named_parameters(), lr=0.1)
    make_step(model, optimizer, 0)
    optimizer.add_param_group({"params": list(other.named_parameters())})
    walked[0] = 0
    make_step(model, optimizer, 1)
    assert walked[0] > 0
    walked[0] = 0
    make_step(model, optimizer, 2)
    assert walked[0] == 0


@pytest.mark.parametrize("kind", ["adamw", "tensor lr", "sgd"])
def test_a_log_leaves_the_step_that_makes_a_state_out(kind: str) -> None:
    model = nn.Linear(3, 2)
    optimizer = MAKE[kind](model.named_parameters())
    log = attach(optimizer, lambda scalars, step: None, every=1)
    dcp.get_optimizer_state_dict(model, optimizer)
    assert optimizer.state and log.steps == 0
    make_step(model, optimizer, 0)
    assert log.steps == 1
    optimizer.state.clear()  # the next checkpoint creates it again
    optimizer.zero_grad()
    dcp.get_optimizer_state_dict(model, optimizer)
    assert log.steps == 1


def test_a_learning_rate_rules_a_state_creation_out(walked: list[int]) -> None:
    """A rank without state steps repeatedly, as one of FSDP1 does that holds no element."""
    assert not call_stack.inside_state_creation([{"lr": 0.0}, {"lr": 0.1}]) and walked[0] == 0
    assert not call_stack.inside_state_creation([{"lr": 0.0}]) and walked[0] > 0
    walked[0] = 0
    assert not call_stack.inside_state_creation([{"lr": torch.tensor(0.1)}]) and walked[0] > 0


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_inside_zero_redundancy(pool: Callable[[int], Pool], kind: str) -> None:
    for first, *later in pool(2).run("tests.sharding.zero_redundancy:frames_walked", kind=kind):
        assert first > 0 and later == [0] * 4
