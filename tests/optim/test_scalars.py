"""The adaptive scalars of parameters on several devices: one copy per device, not one per number."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from am_lightning import AMAdamW
from am_lightning.optim import param_state as state
from am_lightning.optim import state_store as scalars
from tests.optim.harness import assert_bitwise, snapshot

COUNT = 30


def make() -> AMAdamW:
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(4, generator=generator)) for _ in range(COUNT)]
    return AMAdamW([{"params": params[: COUNT // 2]}, {"params": params[COUNT // 2 :], "lr": 0.1}])


def step(optimizer: AMAdamW, number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.randn(4, generator=generator)
    optimizer.step()


def test_a_table_goes_to_each_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every second tensor passes for one on another device."""
    plain, split = make(), make()
    moves: list[tuple[int, ...]] = []
    moved = scalars.moved

    def counted(tensor: Tensor, *arguments: Any) -> Tensor:
        moves.append(tuple(tensor.shape))
        return moved(tensor, *arguments)

    def by_parity(tensors: Any) -> dict[torch.device, list[int]]:
        one, two = list(range(0, len(tensors), 2)), list(range(1, len(tensors), 2))
        return {torch.device("cpu"): one, torch.device("cpu", 0): two}

    for number in range(3):
        step(plain, number)
    monkeypatch.setattr(scalars.StateScalars, "_pack", lambda self: None)
    monkeypatch.setattr(scalars, "_by_device", by_parity)
    monkeypatch.setattr(scalars, "moved", counted)
    for number in range(3):
        moves.clear()
        step(split, number)
    assert len(moves) == 2 * len(scalars.DEFAULTS) + 2, moves  # one read, and one table per device
    assert_bitwise(snapshot(plain), snapshot(split))
    assert torch.equal(torch.stack(list(plain.momentum().values())), torch.stack(list(split.momentum().values())))


def test_sums_on_an_xpu_without_float64_are_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    for has, dtype in ((True, torch.float64), (False, torch.float32)):
        state._xpu_has_float64.cache_clear()
        properties = type("Properties", (), {"has_fp64": has})
        monkeypatch.setattr(torch.xpu, "get_device_properties", lambda device, found=properties: found)
        assert state.widest_dtype(torch.device("xpu")) == dtype
    state._xpu_has_float64.cache_clear()
