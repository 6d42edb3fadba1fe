"""Groups and parameters that others replace: groups of AdamW's checkpoint, appended dicts, a whole model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from am_lightning import AMSGD, AMAdamW, am_adamw, am_sgd, clip_grad_norm_


def params(count: int = 2) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(3, 4, generator=generator)) for _ in range(count)]


def steps(optimizer: Any, given: list[torch.nn.Parameter]) -> list[torch.Tensor]:
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        for p in given:
            p.grad = torch.randn(p.shape, generator=generator) + p.detach()
        clip_grad_norm_(optimizer, 1.0)
        optimizer.step()
    return [p.detach() for p in given]


def adamws(optimizer: Any, given: list[torch.nn.Parameter]) -> None:
    """Restore groups that have AdamW's options, as a callback does."""
    restored = torch.optim.AdamW(given, lr=0.05, betas=(0.8, 0.9)).param_groups
    optimizer.param_groups = copy.copy(restored)


def updated(optimizer: Any, given: list[torch.nn.Parameter]) -> None:
    """Replace the groups by new dicts with some options changed."""
    optimizer.param_groups[:] = [{"params": given, "lr": 0.05, "betas": (0.8, 0.9), "weight_decay": 0.01}]


def appended(optimizer: Any, given: list[torch.nn.Parameter]) -> None:
    optimizer.param_groups[0]["params"] = given[:1]
    optimizer.param_groups[0].update(lr=0.05, betas=(0.8, 0.9), beta1_max=0.8)
    optimizer.param_groups.append({"params": given[1:], "lr": 0.05, "betas": (0.8, 0.9)})


@pytest.mark.parametrize("change", [adamws, updated, appended])
def test_what_is_missing_is_the_optimizers_own(change: Callable[..., None]) -> None:
    given, twins = params(), params()
    optimizer = AMAdamW(given)
    change(optimizer, given)
    ours = steps(optimizer, given)
    theirs = steps(AMAdamW(twins, lr=0.05, betas=(0.8, 0.9)), twins)
    assert all(map(torch.equal, ours, theirs))
    assert all(group["beta1_max"] == 0.8 and group["lambd"] == 0.1 for group in optimizer.param_groups)
    assert optimizer.state_dict()["param_groups"][-1]["eps"] == 1e-8
    assert len(optimizer.momentum()) == 2


def test_a_wrong_option_is_named() -> None:
    given = params()
    optimizer = AMAdamW(given)
    optimizer.param_groups.append({"params": params(1), "lr": float("nan")})
    with pytest.raises(ValueError, match="learning rate"):
        steps(optimizer, given)


def test_of_sgd() -> None:
    given, twins = params(), params()
    optimizer = AMSGD(given)
    optimizer.param_groups = [{"params": given, "lr": 0.05}]
    assert all(map(torch.equal, steps(optimizer, given), steps(AMSGD(twins, lr=0.05), twins)))


def test_a_model_in_place_of_parameters_and_the_reverse() -> None:
    model = torch.nn.Linear(2, 2)
    for kind in (AMAdamW, AMSGD):
        with pytest.raises(TypeError, match=r"Invalid params: Linear .*model.parameters\(\); am_lightning.am_adamw"):
            kind(model)  # type: ignore[arg-type]
        kind(torch.nn.ParameterList(params()))
    for factory in (am_adamw, am_sgd):
        with pytest.raises(TypeError, match=r"Invalid model: generator .*AMAdamW and AMSGD take parameters"):
            factory(model.parameters())  # type: ignore[arg-type]


def test_parameters_that_are_grouped_again_have_the_options_of_their_group() -> None:
    given = params(3)
    optimizer = AMAdamW([{"params": given[:1], "lr": 0.1}, {"params": given[1:], "lr": 0.0}])
    steps(optimizer, given)
    before = [p.detach().clone() for p in given]
    optimizer.param_groups = [{"params": given[:2], "lr": 0.1}, {"params": given[2:], "lr": 0.0}]
    steps(optimizer, given)
    assert [torch.equal(p, b) for p, b in zip(given, before, strict=True)] == [False, False, True]
    optimizer.param_groups = [{"params": given, "lr": 0.1}]
    steps(optimizer, given)
    assert not torch.equal(given[2], before[2])


def test_caps_are_known_before_the_first_step() -> None:
    optimizer = AMAdamW(params())
    optimizer.param_groups = [{"params": params(), "lr": 0.1, "betas": (0.8, 0.9)}]
    assert optimizer.caps() == [0.8, 0.8]
