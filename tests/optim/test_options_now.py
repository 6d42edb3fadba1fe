"""A step uses options, states and groups as they are when it writes, however they have been changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from am_lightning import AMSGD, AMAdamW
from tests.optim.harness import assert_bitwise, snapshot

KERNELS: list[dict[str, Any]] = [{"fused": True}, {"fused": False}, {"foreach": True}, {"foreach": False}]


def made(**options: Any) -> tuple[torch.nn.Parameter, AMAdamW]:
    torch.manual_seed(0)
    param = torch.nn.Parameter(torch.randn(6, 5))
    return param, AMAdamW([("w", param)], lr=0.1, **options)


def stepped(optimizer: torch.optim.Optimizer, param: torch.nn.Parameter, steps: int = 1) -> None:
    for step in range(steps):
        param.grad = torch.cos(torch.arange(30.0).reshape(6, 5) + step)
        optimizer.step()


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
@pytest.mark.parametrize(
    "change", [{"weight_decay": 0.5}, {"lambd": 2.0}, {"betas": (0.89, 0.5)}, {"maximize": True}], ids=str
)
def test_options_that_the_closure_changes(kernel: dict[str, Any], change: dict[str, Any]) -> None:
    """Under Lightning the whole training step runs in the closure."""
    results = []
    for inside in (True, False):
        param, optimizer = made(weight_decay=0.0, **kernel)
        stepped(optimizer, param, 3)

        def closure(param: torch.nn.Parameter = param, optimizer: AMAdamW = optimizer, inside: bool = inside) -> None:
            param.grad = torch.sin(torch.arange(30.0).reshape(6, 5))
            if inside:
                optimizer.param_groups[0].update(change)

        if not inside:
            optimizer.param_groups[0].update(change)
        optimizer.step(closure)
        results.append(snapshot(optimizer))
    assert_bitwise(*results)


def test_a_bad_option_in_the_closure_is_named() -> None:
    param, optimizer = made()
    stepped(optimizer, param)

    def closure() -> None:
        optimizer.param_groups[0]["lambd"] = -1.0

    with pytest.raises(ValueError, match="parameter group 0: Invalid lambd"):
        optimizer.step(closure)


def test_a_group_that_the_closure_adds_takes_part() -> None:
    param, optimizer = made()
    stepped(optimizer, param)
    more = torch.nn.Parameter(torch.ones(3))

    def closure() -> None:
        optimizer.add_param_group({"params": [("more", more)]})
        more.grad = torch.ones(3)

    optimizer.step(closure)
    assert not torch.equal(more.detach(), torch.ones(3))


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_options_that_are_changed_in_place(kernel: dict[str, Any]) -> None:
    results = []
    for in_place in (True, False):
        param, optimizer = made(**kernel)
        optimizer.param_groups[0]["betas"] = [0.89, 0.9]
        stepped(optimizer, param, 3)
        if in_place:
            optimizer.param_groups[0]["betas"][1] = 0.5
        else:
            optimizer.param_groups[0]["betas"] = [0.89, 0.5]
        stepped(optimizer, param, 2)
        results.append(snapshot(optimizer))
    assert_bitwise(*results)


@pytest.mark.parametrize("missing", ["beta_prod", "beta", "prev_lr"])
def test_a_scalar_that_somebody_deletes_is_completed(missing: str) -> None:
    param, optimizer = made()
    stepped(optimizer, param, 3)
    del optimizer.state[param][missing]
    stepped(optimizer, param)
    assert missing in optimizer.state[param] and float(optimizer.state[param]["step"]) == 4


def test_amsgd_from_a_state_dict_of_sgd_walks_gradients_in_their_order() -> None:
    """SGD's groups have ``fused``, for which AMSGD has no kernels."""
    results = []
    for loads in (True, False):
        torch.manual_seed(0)
        param = torch.nn.Parameter(torch.randn(6, 5))
        optimizer = AMSGD([param], lr=0.1)
        if loads:
            optimizer.load_state_dict(torch.optim.SGD([param], lr=0.1, fused=None).state_dict())
        assert "fused" not in optimizer.param_groups[0]
        optimizer.param_groups[0]["fused"] = None  # also if it is set later
        for _ in range(2):
            param.grad = torch.arange(30.0).reshape(5, 6).t()
            optimizer.step()
        results.append(param.detach().clone())
    torch.testing.assert_close(*results, rtol=0, atol=0)
    torch.manual_seed(0)
    plain = torch.nn.Parameter(torch.randn(6, 5))
    reference = AMSGD([plain], lr=0.1, foreach=False)
    for _ in range(2):
        plain.grad = torch.arange(30.0).reshape(5, 6).t().contiguous()
        reference.step()
    torch.testing.assert_close(results[0], plain.detach(), rtol=1e-5, atol=1e-6)
