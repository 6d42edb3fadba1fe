"""The short reference implementations and the optimizers, which compute the same in two sums: 200 float64 steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from am_lightning import AMSGD, AMAdamW
from am_lightning.optim.reference import AMAdamWReference, AMSGDReference

SHAPES = ((5, 3), (4,), (), (2, 2, 2))
STEPS = 200


def _parameters() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in SHAPES]


def _set_gradients(params: list[torch.Tensor], step: int) -> None:
    """Set gradients of a quadratic with noise; the third parameter has none in every fifth step."""
    generator = torch.Generator().manual_seed(step)
    for index, param in enumerate(params):
        noise = torch.randn(param.shape, generator=generator, dtype=torch.float64)
        curvature = torch.linspace(0.2, index + 1.5, param.numel(), dtype=torch.float64).reshape(param.shape)
        param.grad = None if index == 2 and step % 5 == 0 else curvature * param.detach() + 0.05 * noise


def _rate(step: int) -> float:
    """Return a rate with warmup, one step at rate 0, and decay."""
    return 0.0 if step == 50 else 0.3 * min(1.0, (step + 1) / 20) * (1 - step / (2 * STEPS))


def _trained(kind: Any, options: dict[str, Any]) -> tuple[list[torch.Tensor], list[float]]:
    params = _parameters()
    groups = [{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.3, "lambd": 0.4}]
    optimizer = kind(groups, lr=0.3, **options)
    betas = []
    for step in range(STEPS):
        for group, factor in zip(optimizer.param_groups, (1.0, 0.5), strict=True):
            group["lr"] = factor * _rate(step)
        _set_gradients(params, step)
        optimizer.step()
        betas += [float(optimizer.state[param]["beta"]) for param in params if param.grad is not None]
    return params, betas


@pytest.mark.parametrize("scope", ["tensor", "group", "global"])
@pytest.mark.parametrize(
    ("reference", "optimizer", "options"),
    [
        (AMAdamWReference, AMAdamW, {"betas": (0.89, 0.99), "weight_decay": 0.1}),
        (AMSGDReference, AMSGD, {"weight_decay": 0.1}),
        (AMSGDReference, AMSGD, {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    ],
    ids=["adamw", "sgd", "sgd-decoupled"],
)
def test_optimizers_are_their_references(reference: Any, optimizer: Any, options: dict[str, Any], scope: str) -> None:
    options |= {"scope": scope}
    expected, expected_betas = _trained(reference, options)
    params, betas = _trained(optimizer, options)
    assert max(abs(a - b) for a, b in zip(betas, expected_betas, strict=True)) < 1e-12
    for param, other in zip(params, expected, strict=True):
        torch.testing.assert_close(param, other, rtol=1e-12, atol=1e-12)
    cap = 0.89 if optimizer is AMAdamW else 0.9
    inside = sum(0 < beta < cap for beta in betas) / len(betas)
    assert inside > 0.25, f"{inside:.0%} of the betas lie between 0 and the cap"


def test_an_unknown_scope_is_named() -> None:
    params = _parameters()
    _set_gradients(params, 1)
    with pytest.raises(ValueError, match="scope must be 'tensor', 'group' or 'global', not 'layer'"):
        AMAdamWReference(params, scope="layer").step()
