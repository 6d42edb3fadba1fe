"""Functions that each rank runs: steps under another default device, and of a model that is moved or cast in a run."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from am_lightning import clip_grad_norm_
from am_lightning.distributed.strategies.dtensor import local
from tests.device import DEVICE
from tests.sharding.fault_steps import bits, held
from tests.sharding.layouts import LAYOUTS
from tests.sharding.model import RATES, groups_of, train
from tests.sharding.steps import optimizer_of, whole_weights


def under_another_default_device(layout: str, scope: str, **options: Any) -> dict[str, Any]:
    """Make the same run twice, the second time with the optimizer's own calls under ``meta``."""
    ends = []
    for foreign in ("cpu", "meta"):
        placed = LAYOUTS[layout][0](torch.float32)
        optimizer: Any = optimizer_of(placed, "adamw", scope, **options)
        step = optimizer.step

        def clipped(step: Any = step, optimizer: Any = optimizer, foreign: str = foreign) -> None:
            with torch.device(foreign):
                clip_grad_norm_(optimizer, 1.0)
                step()
                optimizer.report()
                optimizer.state_dict()

        optimizer.step = clipped
        seen = train(placed.model, optimizer, range(4), torch.float32, share=placed.share, rate=RATES["adamw"][scope])
        ends.append((bits(seen), held(placed.model, optimizer)))
    return {"same": ends[0] == ends[1], "bits": ends[0][0]}


def _cast(model: nn.Module, how: str) -> None:
    model.to(getattr(torch, how)) if how != "cpu" else model.cpu()


def moved(layout: str, how: str, at: int, **options: Any) -> dict[str, Any]:
    """Call ``model.to`` after ``at`` steps and continue beside a run whose model had that dtype from the start."""
    dtype = torch.float32 if how == "cpu" else getattr(torch, how)
    ends = []
    for moves in (True, False):
        placed = LAYOUTS[layout][0](torch.float32 if moves else dtype)
        made: Any = optimizer_of(placed, "adamw", "tensor", **options)
        go = {"share": placed.share, "device": DEVICE, "rate": RATES["adamw"]["tensor"]}
        train(placed.model, made, range(at), torch.float32 if moves else dtype, **go)
        if moves:
            _cast(placed.model, how)
        seen = train(placed.model, made, range(at, 6), dtype, **go)
        ends.append((seen, whole_weights(placed.model), made))
    (seen, weights, made), (expected, others, _) = ends
    pairs = [(a[name], b[name]) for a, b in zip(seen, expected, strict=True) for name in b]
    return {
        "bits": bits(seen),
        "betas": max(abs(a - b) for a, b in pairs),
        "weights": max(float((weights[name] - other).abs().max()) for name, other in others.items()),
        "dtypes": {str(p.dtype) for p in placed.model.parameters()} | {str(w.dtype) for w in weights.values()},
        "devices": {local(s["exp_avg"]).device.type for s in made.state.values()},
        "skipped": int(made.report()[-4]),
    }


def cast_and_stepped(layout: str, how: str, at: int, ours: bool) -> dict[str, Any]:
    """Make steps with given gradients and cast the model before step ``at``. Return an error as a result."""
    placed = LAYOUTS[layout][0](torch.float32)
    if ours:
        made: Any = optimizer_of(placed, "adamw", "tensor")
    else:
        made = torch.optim.AdamW(groups_of(placed.model), lr=0.1)
    moved = False
    for step in range(5):
        if step == at:
            _cast(placed.model, how)
        before = whole_weights(placed.model)
        for p in placed.model.parameters():
            p.grad = torch.ones_like(p) * (1 + step)
        try:
            made.step()
        except RuntimeError as error:
            return {"error": str(error)}
        moved = any(not torch.equal(before[name], w) for name, w in whole_weights(placed.model).items())
    weights = whole_weights(placed.model)
    return {
        "error": None,
        "weights": {name: w.double().flatten().tolist() for name, w in weights.items()},
        "finite": all(bool(w.isfinite().all()) for w in weights.values()),
        "moved": moved,
        "steps": {float(state["step"]) for state in made.state.values()},
    }
