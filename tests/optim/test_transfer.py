"""Transfers between host and devices: numbers arrive before the host reads them; a CUDA graph keeps its vectors."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from am_lightning import AMAdamW
from am_lightning.optim.gradient_clipping import clip_grad_norm_
from am_lightning.optim.kernels import transfer
from am_lightning.optim.kernels.transfer import Constants

CPU = torch.device("cpu")


class RefuseUnfinished(TorchFunctionMode):
    """Refuse copies to the CPU that are not waited for, because they may be read before they arrive."""

    seen = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.to:
            self.seen += 1
            target = next((a for a in args[1:] if isinstance(a, torch.device)), args[0].device)
            assert not ((kwargs or {}).get("non_blocking") and target.type == "cpu"), "nothing waits for this copy"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [{}, {"foreach": False}, {"foreach": True}, {"fused": True}], ids=str)
def test_copies_to_the_cpu_are_waited_for(options: dict[str, bool]) -> None:
    params = [torch.nn.Parameter(torch.ones(9)) for _ in range(3)]
    optimizer = AMAdamW(params, lr=torch.tensor(0.1), capturable=True, **options)
    with RefuseUnfinished() as mode:
        for step in range(3):
            for i, p in enumerate(params):
                p.grad = None if (i, step) == (1, 2) else torch.ones_like(p)
            clip_grad_norm_(optimizer, 1.0)
            optimizer.step()
    assert mode.seen


def test_the_last_vectors_are_kept() -> None:
    constants = Constants()
    first = constants.vector((0, 1), CPU)
    for i in range(100):
        constants.vector((i,), CPU)
        assert constants.vector((0, 1), CPU) is first, "one that is in use was dropped"
    assert len(constants._kept) == transfer._KEPT_VECTORS
    assert first.tolist() == [0, 1] and constants.vector((True, False), CPU, torch.float64).dtype == torch.float64


def test_what_a_graph_reads_outlives_all_others(monkeypatch: pytest.MonkeyPatch) -> None:
    constants = Constants()
    captured, eager = constants.vector((7, 8), CPU), weakref.ref(constants.vector((9,), CPU))
    with monkeypatch.context() as capture:
        capture.setattr(transfer, "is_capturing", lambda device: True)
        assert constants.vector((7, 8), CPU) is captured
        with pytest.raises(RuntimeError, match="make a step with the same gradients before the capture"):
            constants.vector((1, 2, 3), CPU)
    watched = weakref.ref(captured)
    del captured
    for i in range(100):
        constants.vector((i, i), CPU)
    gc.collect()
    assert watched() is not None and eager() is None
    assert constants.vector((7, 8), CPU) is watched()
