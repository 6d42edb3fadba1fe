"""An optimizer without parameters, as on a pipeline stage that holds none, and one whose parameters are replaced."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from am_lightning import AMSGD, AMAdamW, clip_grad_norm_
from am_lightning.loggers.reader import StatsReader


@pytest.mark.parametrize("scope", ["tensor", "group", "global"])
@pytest.mark.parametrize("kind", [AMAdamW, AMSGD])
def test_no_parameters(kind: type, scope: str) -> None:
    optimizer = kind([{"params": []}], scope=scope)
    optimizer.step()
    assert float(clip_grad_norm_(optimizer, 1.0)) == 0.0
    assert not optimizer.last_step_skipped
    assert optimizer.momentum() == {}
    readings = StatsReader(optimizer)
    readings.read()
    assert readings.scalars()["am/skipped_steps"] == 0.0


def test_a_replaced_parameter_is_let_go_at_once() -> None:
    """A sharding framework replaces all parameters, and the optimizer must not keep the whole model alive."""
    whole, part = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = AMAdamW([("w", whole)])
    optimizer.param_groups[0]["params"][0] = part
    reference = weakref.ref(whole)
    del whole
    gc.collect()
    assert reference() is None
    part.grad = torch.ones(3)
    optimizer.step()
    assert set(optimizer.momentum()) == {"w"}
