"""What callbacks do in every step neither reads a value on the host nor copies one from pageable memory."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from am_lightning import AMAdamW
from am_lightning.recipes.fault_tolerance import FaultTolerance
from am_lightning.recipes.loss_guard import LossGuard

READS = ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__", "nonzero")
UPLOADS = ("new_tensor", "tensor", "as_tensor")


class Waits(TorchFunctionMode):
    """Counts what makes the host wait where tensors are on a GPU: reads, and copies from pageable memory."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[str] = []
        self.uploads: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in READS:
            self.reads.append(name)
        if name in UPLOADS:
            self.uploads.append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def trainer() -> Any:
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = AMAdamW([param])
    param.grad = torch.ones(3)
    optimizer.step()
    strategy = SimpleNamespace(root_device=torch.device("cpu"), reduce=lambda tensor, reduce_op: tensor)
    return SimpleNamespace(global_step=0, world_size=2, strategy=strategy, optimizers=[optimizer])


def end_step(callback: Any, trainer: Any) -> Waits:
    trainer.global_step += 1
    loss = torch.tensor(2.0)
    with Waits() as waits:
        callback.on_train_batch_end(trainer, None, loss, None, 0)
    return waits


def test_the_detector_sees() -> None:
    with Waits() as waits:
        value = torch.tensor(1.0, device="cpu")
        bool(value), float(value), value.item(), value.new_tensor(2.0)
    assert len(waits.reads) == 3 and len(waits.uploads) == 2


def test_the_loss_guard_waits_when_it_looks_only(trainer: Any) -> None:
    guard = LossGuard(check_every_n_steps=3)
    for look in (False, False, True, False):
        waits = end_step(guard, trainer)
        assert bool(waits.reads) is look
        assert not waits.uploads


def test_fault_tolerance_waits_when_ranks_agree_only(trainer: Any) -> None:
    callback = FaultTolerance(check_every_n_steps=2)
    for agree in (False, True, False, True):
        waits = end_step(callback, trainer)
        assert bool(waits.reads) is agree
        assert not waits.uploads
