"""Launches of a step and of clipping for many tensors on an accelerator, counted on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from am_lightning import AMSGD, AMAdamW, clip_grad_norm_
from am_lightning.optim import squares
from tests.optim.launches import Launches, is_multi_tensor

TENSORS = 300


def make(kind: Any, dtypes: list[torch.dtype], count: int = TENSORS, **options: Any) -> torch.optim.Optimizer:
    generator = torch.Generator().manual_seed(0)
    params = []
    for i in range(count):
        shape = (8 + i % 5, 6) if i % 3 else (7 + i % 4,)
        params.append(torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtypes[i % len(dtypes)])))
    optimizer: torch.optim.Optimizer = kind(params, lr=0.01, weight_decay=0.1, foreach=True, **options)
    return optimizer


def give(optimizer: torch.optim.Optimizer, step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
    return [p.grad for p in optimizer.param_groups[0]["params"]]


@pytest.mark.parametrize(
    ("kind", "dtypes", "options", "most"),
    [
        pytest.param(AMAdamW, [torch.float32], {}, 250, id="adamw-float32"),
        pytest.param(AMAdamW, [torch.bfloat16], {}, 260, id="adamw-bfloat16"),
        pytest.param(AMAdamW, [torch.float32, torch.bfloat16], {}, 320, id="adamw-mixed"),
        pytest.param(AMAdamW, [torch.float32], {"exp_avg_dtype": torch.bfloat16}, 300, id="adamw-stochastic"),
        pytest.param(AMSGD, [torch.float32], {}, 250, id="sgd-float32"),
    ],
)
def test_a_step_takes_few_launches(kind: Any, dtypes: list[torch.dtype], options: dict[str, Any], most: int) -> None:
    optimizer = make(kind, dtypes, **options)
    for step in range(2):  # the first step creates states and plans
        give(optimizer, step)
        optimizer.step()
    give(optimizer, 2)
    with Launches() as launches:
        optimizer.step()
    assert launches.total <= most, (launches.total, launches.by_name)


def test_more_tensors_of_a_bucket_cost_only_longer_lists() -> None:
    counts = []
    for tensors in (30, 60):  # one launch of a list holds either number
        optimizer = make(AMAdamW, [torch.float32], tensors)
        for step in range(3):
            give(optimizer, step)
            with Launches() as launches:
                optimizer.step()
        counts.append(launches.total)
    assert counts[0] == counts[1]


@pytest.mark.parametrize(
    ("dtypes", "most"),
    [
        pytest.param([torch.float32], 30, id="float32"),
        pytest.param([torch.bfloat16], 30, id="bfloat16"),
        pytest.param([torch.float32, torch.bfloat16], 40, id="mixed"),
    ],
)
def test_clipping_takes_a_handful(dtypes: list[torch.dtype], most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = make(AMAdamW, dtypes)
    grads = give(optimizer, 0)
    expected = torch.stack([g.double().norm() for g in grads]).norm()
    monkeypatch.setattr(squares, "_in_blocks", lambda device: False)
    optimizer.current_layout()  # type: ignore[attr-defined]
    with Launches() as launches:
        norm = clip_grad_norm_(optimizer, 0.5)  # type: ignore[arg-type]
    assert launches.total <= most, (launches.total, launches.by_name)
    torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0)
    after = torch.stack([p.grad.double().norm() for p in optimizer.param_groups[0]["params"]]).norm()
    torch.testing.assert_close(
        after, torch.tensor(0.5).double(), rtol=1e-2 if torch.bfloat16 in dtypes else 1e-5, atol=0
    )


def test_sums_of_squares_keep_their_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(squares, "_in_blocks", lambda device: False)
    tensors = [torch.full((i + 1,), 1.0, dtype=(torch.float32, torch.bfloat16)[i % 2]) for i in range(6)]
    found = squares.square_sums(tensors, torch.zeros((), dtype=torch.float64))
    torch.testing.assert_close(found, torch.arange(1.0, 7.0, dtype=torch.float64), rtol=1e-6, atol=0)


def test_the_counter_knows_when_a_list_is_taken_one_by_one() -> None:
    lists = [torch.ones(3) for _ in range(50)]
    numbers = [torch.ones(()) for _ in range(50)]
    assert is_multi_tensor([lists, lists], []) and not is_multi_tensor([lists, numbers], [])
    assert not is_multi_tensor([lists], [torch.ones((), dtype=torch.float64)])
    with Launches() as launches:
        torch._foreach_mul(lists, numbers)
    assert launches.total == 50
    with Launches() as launches:
        torch._foreach_mul(lists, lists)
    assert launches.total == 2
