"""foreach handles tensors in buckets of bounded size and splits large ones: small temporaries, the same result."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from am_lightning.optim.kernels import buckets as packs
from tests.optim.harness import assert_bitwise, build, named_params, params_of, snapshot

SHAPES = [(5000,), (7,), (30, 30), (), (0,), (1001,), (64, 31)]
BUCKET = 1000


class Live(TorchDispatchMode):
    """Track the peak of bytes held by tensors that operators have made."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        known = {a.untyped_storage().data_ptr() for a in torch.utils._pytree.tree_leaves(args) if torch.is_tensor(a)}
        for tensor in torch.utils._pytree.tree_leaves(out):
            if torch.is_tensor(tensor) and tensor.untyped_storage().data_ptr() not in known:
                self.add(tensor)
        self.peak = max(self.peak, sum(self.alive.values()))
        return out

    def add(self, tensor: torch.Tensor) -> None:
        key = id(tensor)
        self.alive[key] = tensor.untyped_storage().nbytes()
        weakref.finalize(tensor, self.alive.pop, key, None)


def run(kind: str, scope: str, **options: Any) -> tuple[torch.optim.Optimizer, int]:
    optimizer = build(kind, named_params(SHAPES, torch.float64), lr=0.05, scope=scope, foreach=True, **options)
    peak = 0
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        for p in params_of(optimizer):
            p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype) + 0.5 * p.detach()
        with Live() as live:
            optimizer.step()
        peak = live.peak  # peak of the second step, because the first creates the states
    return optimizer, peak


@pytest.mark.parametrize("scope", ["tensor", "global"])
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_temporaries_are_bounded_and_the_result_is_the_same(
    kind: str, scope: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, whole_peak = run(kind, scope, weight_decay=0.1)
    monkeypatch.setattr(packs, "_BUCKET_ELEMENTS_ON_CPU", BUCKET)
    parts, peak = run(kind, scope, weight_decay=0.1)
    for a, b in zip(snapshot(whole), snapshot(parts), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    numbers = 100 * 8 * len(SHAPES)  # vectors over the rows
    assert peak < 8 * 8 * BUCKET + numbers, f"{peak} bytes alive at once, a bucket is {8 * BUCKET}"
    assert whole_peak > 2 * peak, "without buckets more is alive at once, or nothing was counted"


def test_a_skipped_step_leaves_every_part_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packs, "_BUCKET_ELEMENTS_ON_CPU", BUCKET)
    optimizer, _ = run("adamw", "tensor")
    before = snapshot(optimizer)
    for p in params_of(optimizer):
        p.grad = torch.ones_like(p)
    params_of(optimizer)[0].grad[4321] = float("nan")
    optimizer.step()
    assert bool(optimizer.last_step_skipped)
    assert_bitwise(snapshot(optimizer), before)


def test_sums_over_very_many_blocks_are_those_of_plain_formulas() -> None:
    """A long tensor beside tiny ones has thousands of blocks, which are summed on three levels."""
    found = []
    for tier in (True, False):
        optimizer = build("adamw", named_params([(300_001,), *[(3,)] * 400], torch.float64), lr=0.05, foreach=tier)
        for step in range(2):
            generator = torch.Generator().manual_seed(step)
            for p in params_of(optimizer):
                p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype) + 0.5 * p.detach()
            optimizer.step()
        found.append(torch.stack(list(optimizer.momentum().values())))
    assert len(packs._tree([list(range(4689)), [4689]], 4690)) == 3
    torch.testing.assert_close(*found, rtol=0, atol=1e-6)  # beta is kept in float32


def test_tensors_in_the_order_of_their_strides_and_others_agree_with_plain_formulas() -> None:
    """Channels last is walked in storage order, but a gradient with other strides than its parameter is not."""
    found = []
    for tier in (True, False):
        params = [torch.nn.Parameter(torch.full((5, 3, 4, 6), 0.5, dtype=torch.float64)) for _ in range(3)]
        params[0].data = params[0].data.to(memory_format=torch.channels_last)
        optimizer = build("adamw", params, lr=0.05, foreach=tier)
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            for i, p in enumerate(params):
                grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
                p.grad = torch.empty_like(p).copy_(grad) if i < 2 else grad.to(memory_format=torch.channels_last)
            optimizer.step()
        found.append(torch.stack([p.detach().contiguous() for p in params]))
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-6)  # beta is kept in float32
