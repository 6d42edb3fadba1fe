"""Functions that each rank runs: a step in which one rank has a finite gradient whose square overflows."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from am_lightning import clip_grad_norm_
from am_lightning.distributed.strategies.dtensor import local
from tests.device import DEVICE
from tests.optim.every_size import chunked_for_every_size
from tests.optim.harness import compile_on_cpu
from tests.sharding.fault_steps import held, spoil
from tests.sharding.layouts import LAYOUTS, Placed
from tests.sharding.model import RATES, batch_of, train
from tests.sharding.steps import optimizer_of, whole_weights

BAD, END = 3, 30


def loss_of(placed: Placed, dtype: torch.dtype) -> float:
    """Return the loss of one whole batch, on every rank."""
    x, y = (part.to(DEVICE) for part in batch_of(0, dtype))
    with torch.no_grad():
        return float(F.mse_loss(placed.model(x).float(), y.float()))


def huge_gradient(
    layout: str,
    dtype: str,
    value: float = 1e30,
    compiled: bool = False,
    clip: float | None = None,
    chunked: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Make the last rank's gradient huge in one step, and in the very first."""
    torch.manual_seed(0)
    kind, there = "adamw", getattr(torch, dtype)
    placed = LAYOUTS[layout][0](there)
    rate = 0.1 * RATES[kind]["tensor"]
    if "loss_gap" in options:
        kind, rate = "sgd", 0.5
    with chunked_for_every_size() if chunked else nullcontext(), pytest.MonkeyPatch.context() as patch:
        if compiled:
            compile_on_cpu(patch)
        optimizer = optimizer_of(placed, kind, "tensor", **options)
        before: list[Any] = []

        def before_step(step: int) -> None:
            if step not in (0, BAD):
                return
            if dist.get_rank() == dist.get_world_size() - 1:
                spoil(placed.model, value)
            if clip is not None:
                clip_grad_norm_(optimizer, clip, in_step=True)
            before.append(held(placed.model, optimizer))

        def go(steps: range) -> None:
            train(
                placed.model, optimizer, steps, there, share=placed.share, device=DEVICE,
                rate=rate, before_step=before_step,
            )  # fmt: skip

        at_first = loss_of(placed, there)
        go(range(BAD + 1))
        skipped, untouched = bool(optimizer.last_step_skipped), held(placed.model, optimizer) == before[-1]
        go(range(BAD + 1, END))
    states = [value for state in optimizer.state.values() for value in state.values()]
    weights = whole_weights(placed.model)
    return {
        "skipped": skipped,
        "untouched": untouched,
        "skipped in all": int(optimizer.report()[-4]),
        "finite": all(bool(local(t.detach()).isfinite().all()) for t in (*placed.model.parameters(), *states)),
        "weights": {name: weight.double().flatten().tolist() for name, weight in weights.items()},
        "loss": (at_first, loss_of(placed, there)),
        "described": optimizer.describe(),
    }
