"""Without a compiler small tensors are batched and large ones walked in chunks; one step combines their sums."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from am_lightning.optim.kernels.cpu import chunked
from tests.optim.every_size import WORTH_IT
from tests.optim.harness import SCOPES, Bowl, Twin, assert_bitwise, build, make_oracle, named_params, run_bowl, snapshot
from tests.optim.test_every_step import RATES

SHAPES = [(WORTH_IT,), (7,), (130, 127), (), (33, 4), (0,), (WORTH_IT - 1,)]


@pytest.fixture(autouse=True)
def by_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "_WORTH_IT", WORTH_IT)


def make(kind: str, dtype: torch.dtype, **options: Any) -> torch.optim.Optimizer:
    optimizer = build(kind, named_params(SHAPES, dtype), lr=0.1, weight_decay=0.01, **options)
    for group in optimizer.param_groups:
        if "fused" in group:
            group["fused"] = False
    return optimizer


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
@pytest.mark.parametrize("scope", SCOPES)
def test_float64(kind: str, scope: str) -> None:
    optimizer = make(kind, torch.float64, scope=scope)
    twin = Twin(optimizer, make_oracle(optimizer, scope=scope))
    run_bowl(twin, Bowl.around(SHAPES, seed=1), [(r,) for r in RATES[kind] * 2])
    twin.assert_not_vacuous()
    assert "chunked for 2" in optimizer.describe() and "foreach for 5" in optimizer.describe()


@pytest.mark.parametrize("bad", [0, 1])
def test_a_bad_gradient_of_either_leaves_both_alone(bad: int) -> None:
    optimizer = make("adamw", torch.float32, scope="global")
    params = optimizer.param_groups[0]["params"]
    for step in range(3):
        for param in params:
            param.grad = torch.full_like(param, 0.1 * (step + 1))
        if step == 2:
            before = snapshot(optimizer)
            params[bad].grad[-1] = 2e19  # finite, but its square is not
        optimizer.step()
    assert bool(optimizer.last_step_skipped)
    assert_bitwise(snapshot(optimizer), before)


def test_other_strides_and_shapes_under_a_kept_plan() -> None:
    """A row may keep its number of elements and change its shape or strides from one step to the next."""
    ends = []
    for options in ({"fused": False}, {"foreach": False}):
        param = torch.nn.Parameter(torch.arange(12.0).view(3, 4))
        optimizer = build("adamw", [param], lr=0.1, **options)
        for step in range(4):
            gradient = torch.arange(12.0).view(3, 4).sin() * (step + 1)
            param.grad = gradient.t().contiguous().t() if step % 2 else gradient
            optimizer.step()
            if step == 1:  # FSDP2 and DeepSpeed do this with flattened tensors
                for name in ("exp_avg", "exp_avg_sq"):
                    optimizer.state[param][name] = optimizer.state[param][name].t().contiguous().t()
                param.data = param.data.t().contiguous().t()
        ends.append(param.detach().clone())
    torch.testing.assert_close(*ends)


@pytest.mark.parametrize("numel", [1, 65, 100, 400, 1000])
def test_the_memory_of_buckets_does_not_grow_with_their_number(numel: int) -> None:
    """All buckets use the same scratch matrices in turn, whatever fills their blocks."""
    params = [torch.nn.Parameter(torch.ones(numel)) for _ in range(300_000 // (numel + 63))]
    optimizer: Any = build("adamw", params, fused=False)
    for param in params:
        param.grad = torch.full_like(param, 0.1)
    optimizer.step()
    (passes,) = (passes for _, passes in optimizer._plan._passes)
    buckets = passes._plan.buckets
    assert len(buckets) > 1
    for name in "xgdv":
        assert len({bucket.views[name, torch.float32][0].data_ptr() for bucket in buckets}) == 1


def test_a_large_tensor_with_gaps_is_not_kept() -> None:
    ends = []
    for options in ({"fused": False}, {"foreach": False}):
        param = torch.nn.Parameter(torch.arange(400_000.0).view(400, 1000).sin()[:, ::2])
        optimizer: Any = build("adamw", [param], lr=0.1, weight_decay=0.1, **options)
        for step in range(3):
            param.grad = torch.cos(param.detach() * (step + 1))
            optimizer.step()
        if "fused" in options:
            assert "foreach for 1" in optimizer.describe()
            (bucket,) = optimizer._plan._passes[0][1]._plan.buckets
            assert not bucket.views
        ends.append(param.detach().clone())
    torch.testing.assert_close(*ends)
