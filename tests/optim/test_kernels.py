"""The kernels (single_tensor, chunked, foreach) equal each other to rounding, whatever the inputs are."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.optim.harness import KERNELS, assert_close, build, params_of, to_numpy

SHAPES = [(130, 70), (1,), (), (0,), (9, 0, 2), (300_001,), (3, 5, 7), (65_536,), (65_537,)]
DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.float32, torch.float16, torch.float32]
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "adamw": [{}, {"lambd": 0.0, "weight_decay": 0.0}, {"maximize": True, "weight_decay": 0.3, "eps": 1e-2}],
    "sgd": [
        {},
        {"lambd": 0.0, "weight_decay": 0.1},
        {"maximize": True, "weight_decay": 0.1, "decoupled_weight_decay": True},
    ],
}


def run(kind: str, foreach: bool | None, dtypes: list[torch.dtype], scope: str, options: dict[str, Any]):
    gen = torch.Generator().manual_seed(0)
    params = []
    for i, shape in enumerate(SHAPES):
        p = torch.nn.Parameter(torch.randn(shape, generator=gen).to(dtypes[i % len(dtypes)]))
        params.append(p)
    groups = [{"params": params[:4]}, {"params": params[4:], "lr": 0.04}]
    optimizer = build(kind, groups, lr=0.05, scope=scope, foreach=foreach, **options)
    for step in range(3):
        for i, p in enumerate(params):
            grad = torch.randn(p.shape, generator=gen).to(p.dtype) + 0.5 * p.detach() * (-1) ** step
            p.grad = None if i == 6 and step == 2 else grad
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize(("which", "scope"), [(0, "tensor"), (0, "group"), (0, "global"), (1, "tensor"), (2, "global")])
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_tiers_agree(kind: str, which: int, mixed: bool, scope: str) -> None:
    """Kernels may differ by one float32 rounding of beta and one rounding of the state's dtype, and nothing else."""
    dtypes = DTYPES if mixed else [torch.float32]
    runs = [run(kind, foreach, dtypes, scope, OPTIONS[kind][which]) for foreach in KERNELS]
    for other in (runs[0], runs[2]):
        for a, b in zip(runs[1].momentum().values(), other.momentum().values(), strict=True):
            assert_close(float(a), float(b), 1e-3 if mixed else 2e-6, "beta")
        for p, q in zip(params_of(runs[1]), params_of(other), strict=True):
            tol = {torch.bfloat16: 2e-2, torch.float16: 2e-3}.get(p.dtype, 1e-3 if mixed else 1e-5)
            assert_close(to_numpy(q), to_numpy(p), tol, "weights")
            for key, value in runs[1].state[p].items():
                assert_close(to_numpy(other.state[q][key]), to_numpy(value), tol, key)


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_step_from_one_state_agrees(kind: str, dtype: torch.dtype) -> None:
    """From one state even low precision agrees to one unit in the last place, and beta to 1e-6."""
    rtol = 2**-7 if dtype == torch.bfloat16 else 1e-6
    base = run(kind, False, [dtype], "tensor", {})
    state = base.state_dict()
    ends = []
    for foreach in KERNELS:
        params = [torch.nn.Parameter(p.detach().clone()) for p in params_of(base)]
        optimizer = build(kind, [{"params": params[:4]}, {"params": params[4:]}], scope="tensor", foreach=foreach)
        optimizer.load_state_dict(
            {
                "state": {k: {n: t.clone() for n, t in s.items()} for k, s in state["state"].items()},
                "param_groups": [g | {"foreach": foreach} for g in state["param_groups"]],
            }
        )
        gen = torch.Generator().manual_seed(9)
        for p in params:
            p.grad = torch.randn(p.shape, generator=gen).to(dtype) - 0.4 * p.detach()
        optimizer.step()
        ends.append(optimizer)
    for other in (ends[0], ends[2]):
        for a, b in zip(ends[1].momentum().values(), other.momentum().values(), strict=True):
            assert_close(float(a), float(b), 1e-6, "beta")
        for p, q in zip(params_of(ends[1]), params_of(other), strict=True):
            torch.testing.assert_close(q.detach(), p.detach(), rtol=rtol, atol=1e-6)
