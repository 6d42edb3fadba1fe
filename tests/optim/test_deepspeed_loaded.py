"""An optimizer in a process that has imported DeepSpeed, and parameters replaced by a framework, as by FSDP2."""

from __future__ import annotations

import gc
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from am_lightning import AMAdamW


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record one entry per search through all objects of the process."""
    found: list[int] = []
    get_objects = gc.get_objects

    def counted(*arguments: Any) -> list[Any]:
        found.append(1)
        return get_objects(*arguments)

    monkeypatch.setattr(gc, "get_objects", counted)
    monkeypatch.setitem(sys.modules, "deepspeed", ModuleType("deepspeed"))
    return found


def replaced() -> tuple[nn.Module, AMAdamW]:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    optimizer = AMAdamW(model.named_parameters(), lr=0.1)
    others(optimizer)
    return model, optimizer


def others(optimizer: AMAdamW) -> None:
    group = optimizer.param_groups[0]
    group["params"] = [nn.Parameter(param.detach().clone()) for param in group["params"]]


def read(optimizer: AMAdamW) -> None:
    optimizer.momentum()
    optimizer.report()
    optimizer.caps()
    optimizer.state_dict()
    assert optimizer.parameter_names() == ["0.weight", "0.bias", "1.weight", "1.bias"]


def test_an_engine_is_looked_for_once(looks: list[int]) -> None:
    """Before the first step one search is made, however often anything is read. A step fixes the parameters."""
    _, optimizer = replaced()
    assert not looks
    for _ in range(3):
        read(optimizer)
    assert len(looks) == 1
    others(optimizer)
    read(optimizer)
    assert len(looks) == 2
    for param in optimizer.param_groups[0]["params"]:
        param.grad = torch.ones_like(param)
    optimizer.step()
    read(optimizer)
    assert len(looks) == 2


def test_one_that_comes_later_is_found(looks: list[int]) -> None:
    """The engine puts its own partitions into the groups."""
    model, optimizer = replaced()
    read(optimizer)
    assert not optimizer.is_partitioned()
    for param in model.parameters():
        param._dp_group = None  # DeepSpeed marks its tensors so
    optimizer.param_groups[0]["params"] = [nn.Parameter(torch.zeros(23))]
    assert optimizer.is_partitioned()
    assert len(looks) == 2


def test_nothing_is_remembered_of_empty_groups(looks: list[int]) -> None:
    """ZeRO 3 shows empty groups while it is built."""
    model, optimizer = replaced()
    optimizer.param_groups[0]["params"] = []
    assert not optimizer.is_partitioned()
    for param in model.parameters():
        param._z3_optimizer = None
    assert optimizer.is_partitioned()
