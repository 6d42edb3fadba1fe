"""A tied weight that is twice in a group: torch.optim warns, and the weight is stepped once."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from am_lightning import AMSGD, AMAdamW, clip_grad_norm_

KINDS: dict[str, Any] = {
    "tensor": lambda params: AMAdamW(params, lr=0.05),
    "global": lambda params: AMAdamW(params, lr=0.05, scope="global"),
    "foreach": lambda params: AMAdamW(params, lr=0.05, foreach=True),
    "sgd": lambda params: AMSGD(params, lr=0.05),
}


def trained(kind: str, *, twice: bool, named: bool = False) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    embedding, norm, head = nn.Embedding(4, 3), nn.LayerNorm(3), nn.Linear(3, 4, bias=False)
    head.weight = embedding.weight
    model = nn.Sequential(embedding, norm, head)
    params = [*model.parameters(), *([head.weight] if twice else [])]
    given = [(f"p{i}", p) for i, p in enumerate(params)] if named else params
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "optimizer contains a parameter group with duplicate parameters")
        optimizer = KINDS[kind](given)
    for step in range(4):
        optimizer.zero_grad()
        rows = torch.arange(4).roll(step)
        nn.functional.cross_entropy(model(rows), rows.flip(0)).backward()
        clip_grad_norm_(optimizer, 0.5)
        optimizer.step()
        if step == 1:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return model, optimizer


@pytest.mark.parametrize("kind", KINDS)
def test_given_twice_is_given_once(kind: str) -> None:
    once, twice = (trained(kind, twice=twice) for twice in (False, True))
    for ours, theirs in zip(twice[0].parameters(), once[0].parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert list(twice[1].momentum().values()) == list(once[1].momentum().values())
    assert all(float(state["step"]) == 4 for state in twice[1].state.values())


def test_the_first_name_is_its_name() -> None:
    _, optimizer = trained("tensor", twice=True, named=True)
    assert list(optimizer.momentum()) == ["p0", "p1", "p2"]


def test_a_copy_has_its_names() -> None:
    _, optimizer = trained("tensor", twice=True)
    optimizer.name_parameters((f"n{i}", p) for i, p in enumerate(optimizer.param_groups[0]["params"][:3]))
    assert list(copy.deepcopy(optimizer).momentum()) == list(optimizer.momentum()) == ["n0", "n1", "n2"]
